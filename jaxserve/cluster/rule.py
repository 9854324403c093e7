"""What a routing rule sees and decides. Rules hold no engines, stores or clocks; time is an argument.

A rule is a dataclass of options in a file of `routers/`, whose name is the rule's: `routers/d2lpm.py` holds `D2Lpm`. It
overrides the hooks it needs; without any it takes the least loaded replica.
"""

from collections.abc import Sequence
from typing import ClassVar

from jaxserve.cluster.snapshot import Snapshot
from jaxserve.request import Request


def least_used(snapshots: Sequence[Snapshot]) -> Snapshot:
    """The fewest sequences, then the most free blocks, then the first."""
    return min(snapshots, key=lambda s: (s.num_sequences, -s.num_free, s.replica))


class Rule:
    """One published way to choose among replicas. Every hook may keep state of its own.

    The same calls in the same order with the same times must lead to the same answers: no clock, no unseeded random number.
    """

    asks_cached: ClassVar[bool] = False  # whether `Snapshot.cached` is asked, so that prompts on their way are indexed

    def choose(self, request: Request, snapshots: Sequence[Snapshot], now_s: float) -> Snapshot:
        """Where a request goes: at once, so what this costs a client or a replica may be booked here.

        `snapshots` are at least one, in order of their numbers. They hold what was sent but not seen yet (`router.py`).
        """
        del request, now_s
        return least_used(snapshots)

    def on_finish(self, request: Request, replica: int, num_output: int) -> None:
        """A request that went to this replica has ended, by itself or not, after so many tokens of its answer."""

    def on_program_end(self, program: str) -> None:
        """The caller says that no more requests of a program will come."""
