"""How much of an engine batches may have."""

from types import SimpleNamespace

from jaxserve.config import EngineConfig
from jaxserve.server.lane import Share


def room(*, others, taken=0, lanes=1, share=0.5):
    engine = SimpleNamespace(config=EngineConfig(max_num_seqs=16), num_unfinished=others + taken)
    made = Share(engine, share)
    made.num_taken, made.num_lanes = taken, lanes
    return made.room()


def test_batches_have_their_share_and_only_places_that_nobody_else_wants():
    assert room(others=0) == room(others=8) == 8
    assert room(others=12) == 4
    assert room(others=0, taken=8) == 8, "their own requests are nobody else's"
    assert room(others=0, share=1.0) == 16


def test_batches_share_what_they_have_and_never_stop_altogether():
    assert room(others=0, lanes=3) == 2
    assert room(others=100) == room(others=0, lanes=50) == room(others=0, share=0.01) == 1
