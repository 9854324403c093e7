"""First come, first served: the order of vLLM and Sarathi-Serve (OSDI 2024), and the default."""

from collections.abc import Iterator, Sequence

from jaxserve.scheduler.policy import View


class Fcfs:
    """Admit by arrival; preempt who was admitted last."""

    def on_arrival(self, view: View, now_s: float) -> None:
        """Nothing to remember."""

    def order(self, waiting: Sequence[View], now_s: float) -> Iterator[View]:
        """By arrival; the queue already is, with preempted sequences in front."""
        del now_s
        return iter(waiting)

    def victim(self, running: Sequence[View], now_s: float) -> View:
        """The last one admitted: it has the least to lose."""
        del now_s
        return running[-1]

    def charge(self, view: View, prefill_tokens: int, decode_tokens: int) -> None:
        """Nothing to account."""

    def on_finish(self, view: View, now_s: float) -> None:
        """Nothing to forget."""
