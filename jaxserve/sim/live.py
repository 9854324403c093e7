"""A real engine in the place of a simulated replica, in real time; and the same run again, simulated.

The event loop, the arrivals and the records are the simulator's; only steps and their times are real. Time is read at few
places, and written down: between two of them the clock stands still. So a run can be repeated from its list of instants by
a simulated replica, and must then make the same plans, because all that decides is the same code.
"""

import time
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from jaxserve.engine import Engine
from jaxserve.executor.base import Executor
from jaxserve.pipeline import Pipeline
from jaxserve.request import Request
from jaxserve.scheduler.policy import Policy
from jaxserve.scheduler.progress import Progress
from jaxserve.scheduler.sequence import Sequence
from jaxserve.sim.record import Steps
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.step import Capacity, RowResult, StepPlan, StepResult


class SteppedClock(Protocol):
    """Stands still between calls of `latch` and `wait`."""

    def now_s(self) -> float:
        """The last instant that was read."""
        ...

    def latch(self) -> float:
        """Read the time."""
        ...

    def wait(self, until_s: float) -> None:
        """Let time pass until then."""
        ...


class LatchedClock:
    """Real time from the first reading on. `instants` has every reading."""

    def __init__(self) -> None:
        self.instants = array("d")
        self._start_s: float | None = None
        self._now_s = 0.0

    def now_s(self) -> float:
        """The last instant that was read."""
        return self._now_s

    def latch(self) -> float:
        """Read the time."""
        if self._start_s is None:
            self._start_s = time.perf_counter()
        self._now_s = time.perf_counter() - self._start_s
        self.instants.append(self._now_s)
        return self._now_s

    def wait(self, until_s: float) -> None:
        """Sleep."""
        time.sleep(max(until_s - self.latch(), 0.0))
        self.latch()


class RepeatedClock:
    """The instants of a `LatchedClock`, once more."""

    def __init__(self, instants: Iterable[float]):
        self._instants: Iterator[float] = iter(instants)
        self._now_s = 0.0

    def now_s(self) -> float:
        """The last instant that was read."""
        return self._now_s

    def latch(self) -> float:
        """The next one. After the last time stands still: then the runs have parted before."""
        self._now_s = next(self._instants, self._now_s)
        return self._now_s

    def wait(self, until_s: float) -> None:
        """As often as real time was read."""
        del until_s
        self.latch()
        self.latch()


class Latching:
    """A stepped clock as the event loop sees it: it looks at the time."""

    def __init__(self, clock: SteppedClock):
        self._clock = clock

    def now_s(self) -> float:
        """Read the time."""
        return self._clock.latch()


class TimedExecutor:
    """An executor whose results come at an instant, with a record of its steps."""

    def __init__(self, executor: Executor, clock: SteppedClock):
        self.steps = Steps()
        self.collected_s = 0.0  # when the step that was collected last was dispatched
        self._executor, self._clock = executor, clock

    def capacity(self) -> Capacity:
        """What fits."""
        return self._executor.capacity()

    def dispatch(self, plan: StepPlan) -> tuple[float, StepPlan, Any]:
        """Start a step."""
        self.steps.sign(plan)
        return self._clock.now_s(), plan, self._executor.dispatch(plan)

    def collect(self, pending: tuple[float, StepPlan, Any]) -> StepResult:
        """Wait for a step."""
        self.collected_s, plan, handle = pending
        result = self._executor.collect(handle)
        steps = self.steps
        steps.start_s.append(self.collected_s)
        steps.end_s.append(self._clock.latch())
        steps.num_rows.append(len(plan.rows))
        steps.num_tokens.append(plan.num_tokens)
        steps.num_decodes.append(sum(row.start > 0 and row.num_tokens == 1 for row in plan.rows))
        steps.num_padded.append(result.padded_tokens)
        return result


class LiveReplica:
    """See `sim.replica.Replica`, whose place it takes. The engine must have been built with `clock`, and be idle."""

    def __init__(self, index: int, spec: ReplicaSpec, engine: Engine, executor: Executor, clock: LatchedClock):
        self.index, self.spec = index, spec
        self.clock = Latching(clock)
        self.executor = TimedExecutor(executor, clock)
        self.scheduler = engine.scheduler
        self._engine, self._inner = engine, clock
        engine.pipeline = Pipeline(engine.scheduler, self.executor, clock, overlap=spec.overlap)

    @property
    def has_work(self) -> bool:
        """Whether a sequence has not ended, or a step is under way."""
        return self._engine.has_work

    @property
    def is_stepping(self) -> bool:
        """Whether a step is under way."""
        return self._engine.pipeline.is_busy

    def idle_until(self, now_s: float) -> None:
        """Sleep."""
        if now_s > self._inner.now_s():
            self._inner.wait(now_s)

    def add(self, request: Request, token: RowResult, length: int) -> str:
        """Queue a request; the answer is the model's."""
        del token, length
        self.idle_until(request.arrival_s)
        self._engine.add(request)
        return self.scheduler.waiting[-1].seq_id

    def advance(self) -> list[Progress]:
        """One turn of the engine."""
        self._engine.step()
        return self._engine.pipeline.progress

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""


class RepeatedReplica(Replica):
    """A simulated replica whose steps end at the instants of a live one."""

    def __init__(self, index: int, spec: ReplicaSpec, policy: Policy, instants: Iterable[float]):
        super().__init__(index, spec, policy)
        self._inner = RepeatedClock(instants)
        self.clock = Latching(self._inner)
        self.executor = TimedExecutor(self.executor, self._inner)
        self._pipeline = Pipeline(self.scheduler, self.executor, self._inner, overlap=spec.overlap)

    def idle_until(self, now_s: float) -> None:
        """As the live one did."""
        if now_s > self._inner.now_s():
            self._inner.wait(now_s)
