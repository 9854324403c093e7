"""Smaller `Request.priority` first, then by arrival: vLLM's `priority` policy."""

from collections.abc import Iterator, Sequence

from jaxserve.scheduler.policy import View


def _rank(view: View) -> tuple[int, float]:
    return view.request.priority, view.arrival_s


class Priority:
    """Admit by priority; preempt the least urgent."""

    def on_arrival(self, view: View, now_s: float) -> None:
        """Nothing to remember."""

    def order(self, waiting: Sequence[View], now_s: float) -> Iterator[View]:
        """By priority, then arrival."""
        del now_s
        return iter(sorted(waiting, key=_rank))

    def victim(self, running: Sequence[View], now_s: float) -> View:
        """The least urgent, and of those the latest."""
        del now_s
        return max(reversed(running), key=_rank)  # of equals `max` takes the first

    def charge(self, view: View, prefill_tokens: int, decode_tokens: int) -> None:
        """Nothing to account."""

    def on_finish(self, view: View, now_s: float) -> None:
        """Nothing to forget."""
