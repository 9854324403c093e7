"""The digest of plans: whatever a plan says of who runs what changes it."""

from jaxserve.sim.record import Steps
from jaxserve.step import BlockCopy, BlockSwap, Row, Seat, StepPlan

SEAT = Seat(seq_id="a", slot=0)


def digest(**changes) -> str:
    """Of one plan."""
    row = {"seat": SEAT, "start": 8, "token_ids": (1, 2), "blocks": (3, 4), "samples": True}
    moves = {name: changes.pop(name) for name in ("swap_outs", "swap_ins", "prefetches", "copies") if name in changes}
    steps = Steps()
    steps.sign(StepPlan(index=changes.pop("index", 1), rows=(Row(**row | changes),), **moves))
    return steps.digest.hexdigest()


def test_every_part_of_a_plan_counts():
    swaps = (BlockSwap(1, 2),)
    digests = [
        digest(),
        digest(index=2),
        digest(seat=Seat(seq_id="b", slot=0)),
        digest(start=9),
        digest(token_ids=(1, 2, 3)),
        digest(feeds_last=True, token_ids=(1, 2, 3)),
        digest(blocks=(3, 5)),
        digest(blocks=()),
        digest(swap_outs=swaps),
        digest(swap_ins=swaps),
        digest(prefetches=swaps),
        digest(copies=(BlockCopy(1, 2),)),
    ]
    assert len(set(digests)) == len(digests)
    assert digest() == digest(token_ids=(7,), feeds_last=True), "tokens themselves are not part of it, only how many"
