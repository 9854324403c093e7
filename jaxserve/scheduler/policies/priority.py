"""Smaller priority first, then by arrival: vLLM's `priority` policy."""

import dataclasses
from collections.abc import Iterator, Sequence

from jaxserve.scheduler.policy import Policy, View


def _rank(view: View) -> tuple[float, float]:
    return view.priority, view.arrival_s


@dataclasses.dataclass(slots=True)
class Priority(Policy):
    """Admit by priority; preempt the least urgent. The urgent do not throw out who runs already, unless memory is short."""

    def order(self, waiting: Sequence[View], running: Sequence[View], now_s: float) -> Iterator[View]:
        """By priority, then arrival."""
        del running, now_s
        return iter(sorted(waiting, key=_rank))

    def victim(self, running: Sequence[View], now_s: float) -> View:
        """The least urgent, and of those the latest."""
        del now_s
        return max(reversed(running), key=_rank)  # of equals `max` takes the first
