"""Snapshots that no replica can have are refused."""

import math

import pytest

from jaxserve.errors import InvariantError
from tests.cluster.fleet import snapshot


@pytest.mark.parametrize(
    "values",
    [
        {"num_free": 101},
        {"num_free": -1},
        {"num_running": -1},
        {"num_waiting": -1},
        {"num_urgent": 1},
        {"num_accepted": -1},
        {"waiting_blocks": -1},
        {"queued_tokens": -1},
        {"work_s": -0.1},
        {"work_s": math.nan},
        {"time_s": math.inf},
        {"block_size": 0},
        {"num_slots": 0},
        {"replica": -1},
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused(values):
    with pytest.raises(InvariantError, match="cannot be in such a state"):
        snapshot(**values)


def test_blocks_are_counted_up():
    assert [snapshot().blocks_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]
