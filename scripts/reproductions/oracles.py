"""Orders that no server can have, to compare with: they know how long every program will be."""

from collections import Counter
from collections.abc import Iterator, Sequence

from jaxserve.scheduler.policy import Policy, View
from jaxserve.workload.call import Workload


class ShortestRemaining(Policy):
    """The program with the fewest answer tokens left goes first (SRPT). Displaces as the level queues do: every `window`
    steps, and nobody that was admitted since."""

    def __init__(self, workload: Workload, window: int = 8):
        self._left = Counter[str]()
        for call in workload.calls:
            self._left[call.program] += call.output_tokens
        self._window = window
        self._steps = 0
        self._admitted: dict[str, int] = {}

    def tick(self, now_s: float) -> None:
        self._steps += 1

    def charge(self, view: View, prefill_tokens: int, decode_tokens: int) -> None:
        self._left[view.request.program] -= decode_tokens

    def order(self, waiting: Sequence[View], running: Sequence[View], now_s: float) -> Iterator[View]:
        return iter(sorted(waiting, key=self._rank))

    def on_admit(self, view: View, num_cached: int, now_s: float) -> None:
        self._admitted[view.seq_id] = self._steps

    def on_finish(self, view: View, now_s: float) -> None:
        self._admitted.pop(view.seq_id, None)

    def displaced(self, view: View, running: Sequence[View], now_s: float) -> View | None:
        if self._steps % self._window:
            return None
        rank = self._rank(view)
        behind = [each for each in running if self._rank(each) > rank and self._rests(each)]
        return max(behind, key=self._rank, default=None)

    def victim(self, running: Sequence[View], now_s: float) -> View:
        return max(running, key=self._rank)

    def _rests(self, view: View) -> bool:
        return self._steps - self._admitted[view.seq_id] >= self._window

    def _rank(self, view: View) -> tuple[int, float, str]:
        return self._left[view.request.program], view.arrival_s, view.seq_id


class FirstProgram(Policy):
    """The program that came first goes first."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}

    def on_arrival(self, view: View, now_s: float) -> None:
        self._first.setdefault(view.request.program, view.arrival_s)

    def order(self, waiting: Sequence[View], running: Sequence[View], now_s: float) -> Iterator[View]:
        return iter(sorted(waiting, key=lambda view: (self._first[view.request.program], view.arrival_s)))
