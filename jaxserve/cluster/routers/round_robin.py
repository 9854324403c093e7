"""One replica after the other, whatever they do: what all others are compared with."""

import dataclasses
from collections.abc import Sequence

from jaxserve.cluster.rule import Rule
from jaxserve.cluster.snapshot import Snapshot
from jaxserve.request import Request


@dataclasses.dataclass(slots=True)
class RoundRobin(Rule):
    """The replica after the last one, in the order of their numbers."""

    _last: int = dataclasses.field(default=-1, init=False)

    def choose(self, request: Request, snapshots: Sequence[Snapshot], now_s: float) -> Snapshot:
        """The next one that takes requests."""
        del request, now_s
        choice = next((s for s in snapshots if s.replica > self._last), snapshots[0])
        self._last = choice.replica
        return choice
