"""Level queues by service received: the shortest programs first, without knowing how long any of them is.

A call enters the queue of the level that its program's service so far puts it in, and moves down as it uses up one
quantum after the other. Lower levels go first, first come first served in each. A call that has waited `beta` times as
long as it ran goes back to the first level. Running and waiting calls stand in the same queues: when slots or blocks are
short, who stands further back is preempted and keeps its place.

This is what PLAS and ATLAS of Autellix have in common (2025, arXiv 2502.13965; NSDI 2026 as Agentix). The paper's text was
not at hand: rules and numbers are those of re-implementations that cite its algorithm 1. Service is counted in answer
tokens, so that it is the same in every run.
"""

import dataclasses
import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

from jaxserve.errors import ConfigError
from jaxserve.request import Request
from jaxserve.scheduler.policy import Policy, View
from jaxserve.scheduler.programs import Programs


class ProgramRow:
    """What is known of one program."""

    __slots__ = ("longest", "paths", "run_s", "service", "wait_s")

    def __init__(self, now_s: float):
        del now_s
        self.service = 0.0  # of all calls that have ended
        self.longest = 0.0  # of one path of calls that have ended
        self.paths: dict[str, float] = {}  # by request: service of the longest path that ends with it
        # Of the path that has taken longest, since a call of it was promoted. Not the sum over calls at the same time.
        self.wait_s = 0.0
        self.run_s = 0.0


class Call:
    """One live sequence. Smaller `rank` goes first."""

    __slots__ = (
        "before",
        "level",
        "limit",
        "place",
        "prefilled",
        "quantum",
        "row",
        "run_s",
        "running_since",
        "served",
        "since_s",
        "view",
        "wait_s",
    )

    def __init__(self, view: View, row: ProgramRow, now_s: float):
        self.view = view
        self.row = row
        self.before = 0.0  # service of the program when it came (PLAS: all of it; ATLAS: of the longest path to it)
        self.level = 0
        self.place = 0  # in the queue of its level
        self.quantum = 0.0  # service it may still have on this level
        self.served = 0.0
        self.prefilled = 0  # prompt tokens, if they count
        self.wait_s, self.run_s = row.wait_s, row.run_s  # of the path up to `since_s`
        self.since_s = now_s  # when it began to wait, or to run
        self.running_since = -1  # the step of its admission; -1: it waits
        self.limit = math.inf  # when it has waited too long

    @property
    def rank(self) -> tuple[int, int]:
        """Its place in the order of all."""
        return self.level, self.place


@dataclasses.dataclass(slots=True)
class Levels(Policy):
    """What the policies of this kind share; they say where a call begins (`_start`) and what its end changes (`_fold`).

    `levels` queues; the first is for service below `first_bound` tokens, each further one for `bound_factor` times as
    much, the last for all above. A quantum is the width of its level; who uses up one of the last level goes behind all
    others there. Nobody is displaced within `window` steps of its admission, or with less than that many tokens of its
    quantum left, and only every `window` steps. `prefill_weight`: what a prompt token counts for as service (0 in the
    paper: a program of long prompts and short answers passes for short).
    """

    levels: int = 5
    first_bound: float = 64.0
    bound_factor: float = 4.0
    beta: float = 4.0
    window: int = 8
    prefill_weight: float = 0.0
    ttl_s: float = 600.0
    programs: Programs[ProgramRow] = dataclasses.field(init=False, repr=False)
    _calls: dict[str, Call] = dataclasses.field(init=False, repr=False, default_factory=dict)
    # Those that wait, by rank; no two ranks are equal.
    _queue: list[tuple[tuple[int, int], Call]] = dataclasses.field(init=False, repr=False, default_factory=list)
    # When who waits has waited too long; stale where a call does not wait any more, or waits anew.
    _limits: list[tuple[float, int, Call]] = dataclasses.field(init=False, repr=False, default_factory=list)
    _places: int = dataclasses.field(init=False, repr=False, default=0)
    _steps: int = dataclasses.field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        for name, least in (("levels", 1), ("window", 1), ("beta", 0), ("prefill_weight", 0), ("ttl_s", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"scheduling option {name}={getattr(self, name)!r} must be at least {least}")
        if not self.first_bound > 0 or self.bound_factor <= 1 or self.levels > 64:
            raise ConfigError(
                f"scheduling options first_bound={self.first_bound!r}, bound_factor={self.bound_factor!r}, "
                f"levels={self.levels!r} make no levels",
                remedy="Take a bound above 0, a factor above 1 and at most 64 levels",
            )
        self.programs = Programs(ProgramRow, self.ttl_s)

    def on_arrival(self, view: View, now_s: float) -> None:
        """Into the level of its program's service."""
        call = Call(view, self.programs.join(self._member(view), now_s), now_s)
        self._calls[view.seq_id] = call
        call.before = self._start(call.row, view.request)
        call.level = self._level_of(call.before)
        self._enter(call)
        self._wait(call)

    def order(self, waiting: Sequence[View], running: Sequence[View], now_s: float) -> Iterator[View]:
        """By level, then by place."""
        del waiting, running, now_s
        return (call.view for _, call in self._queue[:])

    def victim(self, running: Sequence[View], now_s: float) -> View:
        """Who stands furthest back."""
        del now_s
        return max(running, key=self._rank)

    def displaced(self, view: View, running: Sequence[View], now_s: float) -> View | None:
        """Who stands furthest back of those behind the waiting one; at the end of a window only."""
        del now_s
        if self._steps % self.window:
            return None
        rank = self._calls[view.seq_id].rank
        behind = [other for other in running if self._may_displace(self._calls[other.seq_id], rank)]
        return max(behind, key=self._rank, default=None)

    def on_admit(self, view: View, num_cached: int, now_s: float) -> None:
        """It runs."""
        del num_cached
        call = self._calls[view.seq_id]
        self._unqueue(call)
        call.wait_s += now_s - call.since_s
        call.since_s, call.running_since, call.limit = now_s, self._steps, math.inf

    def on_preempt(self, view: View, now_s: float) -> None:
        """It waits, at the place and with the quantum that it has by now."""
        call = self._calls[view.seq_id]
        call.run_s += now_s - call.since_s
        call.since_s, call.running_since = now_s, -1
        self._wait(call)

    def charge(self, view: View, prefill_tokens: int, decode_tokens: int) -> None:
        """Service uses up the quantum."""
        call, gain = self._calls[view.seq_id], float(decode_tokens)
        if prefill_tokens and self.prefill_weight:  # what is computed again after a preemption does not count twice
            before, most = call.prefilled, view.num_prompt
            call.prefilled += prefill_tokens
            gain += self.prefill_weight * (min(call.prefilled, most) - min(before, most))
        call.served += gain
        call.quantum -= gain
        if call.quantum <= 0:
            waits = call.running_since < 0
            if waits:
                self._unqueue(call)
            call.level = min(call.level + 1, self.levels - 1)
            self._enter(call)
            if waits:
                self._wait(call)

    def on_finish(self, view: View, now_s: float) -> None:
        """Its service is its program's from now on, whether it came to its end or was aborted."""
        call = self._calls.pop(view.seq_id)
        waits = call.running_since < 0
        if waits:
            self._unqueue(call)
        call.limit = math.inf
        passed_s = now_s - call.since_s
        wait_s, run_s = call.wait_s + passed_s * waits, call.run_s + passed_s * (not waits)
        row = call.row
        if wait_s + run_s > row.wait_s + row.run_s:
            row.wait_s, row.run_s = wait_s, run_s
        self._fold(row, view.request, call.before, call.served)
        self.programs.leave(self._member(view), now_s)

    def on_program_end(self, program: str, now_s: float) -> None:
        """Forget it, when its last call is over."""
        del now_s
        self.programs.end(program)

    def tick(self, now_s: float) -> None:
        """Promote who has waited too long; forget programs that have been idle too long."""
        self._steps += 1
        while self._limits and self._limits[0][0] <= now_s:
            limit, _, call = heapq.heappop(self._limits)
            if call.limit == limit and call.running_since < 0:
                self._promote(call, now_s)
        self.programs.sweep(now_s)

    def _member(self, view: View) -> Request:
        """The request whose program the call is a part of."""
        return view.request

    def _start(self, row: ProgramRow, request: Request) -> float:
        """The service that a call of a program begins with. Without an override none."""
        del row, request
        return 0.0

    def _fold(self, row: ProgramRow, request: Request, before: float, served: float) -> None:
        """A call that began with `before` has ended, `served` later."""

    def _rank(self, view: View) -> tuple[int, int]:
        return self._calls[view.seq_id].rank

    def _may_displace(self, call: Call, rank: tuple[int, int]) -> bool:
        return (
            rank < call.rank
            and call.quantum >= min(self.window, self._width(call.level))
            and self._steps - call.running_since >= self.window
        )

    def _level_of(self, service: float) -> int:
        bound = self.first_bound
        for level in range(self.levels - 1):
            if service < bound:
                return level
            bound *= self.bound_factor
        return self.levels - 1

    def _width(self, level: int) -> float:
        below = self.first_bound * self.bound_factor ** (level - 1) if level else 0.0
        return self.first_bound * self.bound_factor**level - below

    def _enter(self, call: Call) -> None:
        """To the end of its level's queue, with a whole quantum."""
        self._places += 1
        call.place, call.quantum = self._places, self._width(call.level)

    def _wait(self, call: Call) -> None:
        """Into the queue of those that wait, until it has waited too long."""
        insort(self._queue, (call.rank, call))
        if call.level:
            call.limit = call.since_s + max(self.beta * call.run_s - call.wait_s, 0.0)
            heapq.heappush(self._limits, (call.limit, call.place, call))

    def _unqueue(self, call: Call) -> None:
        del self._queue[bisect_left(self._queue, (call.rank,))]

    def _promote(self, call: Call, now_s: float) -> None:
        self._unqueue(call)
        call.level, call.limit = 0, math.inf
        self._enter(call)
        call.wait_s = call.run_s = call.row.wait_s = call.row.run_s = 0.0
        call.since_s = now_s
        insort(self._queue, (call.rank, call))
