"""Least slack first: every stage of a program has a deadline of its own inside of the program's.

HexGen-Text2SQL (2025, arXiv 2505.05286), second level: each engine takes the waiting call whose slack is least, which is
its deadline less the service it still needs. The paper reports deadlines up to 1.67 times as tight (1.41 on average)
and 1.75 times the throughput (1.65) of vLLM, with dispatch to unequal engines (`cluster/router.py`) as the first level.

What differs: stages to come are learned, not written down (`scheduler/workflow.py`); prompts are chunked, and the order is
that of every step; and a program that is far overdue makes way, where the paper's code lets it go before all others.
Nobody is preempted, unless memory is short. Deadlines are those of `Request.deadline_s`; stages of `Request.stage`.
"""

import dataclasses
import heapq
import math
from collections.abc import Iterator, Sequence

from jaxserve.errors import ConfigError
from jaxserve.scheduler.policy import Policy, View
from jaxserve.scheduler.workflow import Averages, Workflow

MODES = ("least_slack", "edf", "moore_hodgson")


class _Call:
    __slots__ = ("due_s", "last_s", "limit_s", "run_s", "runs", "since_s", "view")

    def __init__(self, view: View, now_s: float):
        self.view = view
        self.due_s = self.last_s = math.inf  # its deadline; when it falls behind all that can still be in time
        self.limit_s = math.inf  # when it goes before all others
        self.runs = False
        self.since_s = now_s  # when it began to run
        self.run_s = 0.0  # before that

    def served_s(self, now_s: float) -> float:
        """Seconds that it ran so far."""
        return self.run_s + (now_s - self.since_s if self.runs else 0.0)


@dataclasses.dataclass(slots=True)
class Hexgen(Policy):
    """The order of waiting calls by `mode`: `least_slack`; `edf`, the earliest deadline; or `moore_hodgson`, the earliest
    deadline of those that the rule of Moore and Hodgson (1968) keeps, so that as few as possible are late.

    A call of a program that is overdue by more than `overdue_cap` times its deadline falls to best effort, with those that
    have no deadline. Who has waited `patience_s` seconds beyond its deadline (without one: since it came) goes first.
    The service of a stage is the mean of calls like it, of which the newest counts `smoothing`.
    """

    mode: str = "least_slack"
    overdue_cap: float = 1.0
    patience_s: float = 300.0
    smoothing: float = 0.1
    ttl_s: float = 600.0
    workflow: Workflow = dataclasses.field(init=False, repr=False)  # policies of several replicas may share one
    _service: Averages = dataclasses.field(init=False, repr=False)  # here, by stage
    _calls: dict[str, _Call] = dataclasses.field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"scheduling option mode={self.mode!r:.40} must be one of {', '.join(MODES)}")
        if not 0 < self.smoothing <= 1:
            raise ConfigError(f"scheduling option smoothing={self.smoothing!r} must be above 0 and at most 1")
        for name in ("overdue_cap", "patience_s", "ttl_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"scheduling option {name}={getattr(self, name)!r} must not be negative")
        self.workflow = Workflow(self.smoothing, self.ttl_s)
        self._service = Averages(self.smoothing)

    def on_arrival(self, view: View, now_s: float) -> None:
        """It gets a deadline."""
        call = self._calls[view.seq_id] = _Call(view, now_s)
        due = self.workflow.begin(view.request, now_s)
        if due is None:
            call.limit_s = now_s + self.patience_s
            return
        call.due_s, end_s = due
        call.last_s = end_s + self.overdue_cap * (view.request.deadline_s or 0.0)
        call.limit_s = max(call.due_s, now_s) + self.patience_s

    def order(self, waiting: Sequence[View], running: Sequence[View], now_s: float) -> Iterator[View]:
        """Who has waited too long; then by mode; then best effort, as they came."""
        calls = sorted((self._calls[view.seq_id] for view in waiting), key=lambda call: self._key(call, now_s))
        if self.mode == "moore_hodgson":
            calls = self._fewest_late(calls, max(len(running), 1), now_s)
        return (call.view for call in calls)

    def victim(self, running: Sequence[View], now_s: float) -> View:
        """Who has most time."""
        return max(running, key=lambda view: self._key(self._calls[view.seq_id], now_s))

    def on_admit(self, view: View, num_cached: int, now_s: float) -> None:
        """It runs."""
        del num_cached
        call = self._calls[view.seq_id]
        call.runs, call.since_s = True, now_s

    def on_preempt(self, view: View, now_s: float) -> None:
        """It waits again."""
        call = self._calls[view.seq_id]
        call.run_s, call.runs = call.served_s(now_s), False

    def on_finish(self, view: View, now_s: float) -> None:
        """How long it took is known now."""
        call = self._calls.pop(view.seq_id)
        service_s = call.served_s(now_s)
        self._service.note(view.request.stage, service_s)
        self.workflow.end(view.request, service_s, now_s)

    def on_abort(self, view: View, now_s: float) -> None:
        """It took less than it would have."""
        del self._calls[view.seq_id]
        self.workflow.end(view.request, None, now_s)

    def on_program_end(self, program: str, now_s: float) -> None:
        """Learn from it."""
        del now_s
        self.workflow.programs.end(program)

    def tick(self, now_s: float) -> None:
        """Programs that have been idle for too long have ended."""
        self.workflow.programs.sweep(now_s)

    def left_s(self, view: View, now_s: float) -> float:
        """Service that a call still needs, if it takes as long as those before it."""
        return max(self._service.of(view.request.stage) - self._calls[view.seq_id].served_s(now_s), 0.0)

    def _key(self, call: _Call, now_s: float) -> tuple[int, float, float]:
        """Smaller goes first."""
        view = call.view
        if now_s >= call.limit_s:
            return 0, call.limit_s, view.arrival_s
        if math.isinf(call.due_s) or now_s > call.last_s:
            return 2, view.arrival_s, view.arrival_s
        return 1, call.due_s - (self.left_s(view, now_s) if self.mode == "least_slack" else 0.0), view.arrival_s

    def _fewest_late(self, calls: list[_Call], width: int, now_s: float) -> list[_Call]:
        """Of calls by deadline: whenever one would be late, the longest so far goes behind those that are in time.
        `width` calls at once are taken for one server that is so many times as fast."""
        first = [call for call in calls if self._key(call, now_s)[0] == 0]
        due = [call for call in calls if self._key(call, now_s)[0] == 1]
        end_s, kept, late = now_s, list[tuple[float, int]](), set[int]()
        for number, call in enumerate(due):
            left_s = self.left_s(call.view, now_s) / width
            heapq.heappush(kept, (-left_s, number))
            end_s += left_s
            if end_s > call.due_s:
                longest, dropped = heapq.heappop(kept)
                end_s += longest
                late.add(dropped)
        in_time = [call for number, call in enumerate(due) if number not in late]
        return first + in_time + [due[number] for number in sorted(late)] + calls[len(first) + len(due) :]
