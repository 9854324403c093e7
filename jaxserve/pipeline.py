"""The loop round the scheduler: plan, dispatch, collect, commit. The engine and the simulator run this same one."""

from collections import deque
from typing import Any

from jaxserve.clock import Clock
from jaxserve.executor.base import Executor
from jaxserve.scheduler.core import Scheduler
from jaxserve.scheduler.progress import Progress
from jaxserve.step import StepPlan


class Pipeline:
    """Steps in order. With `overlap`, one is planned and dispatched while the one before it runs."""

    def __init__(self, scheduler: Scheduler, executor: Executor, clock: Clock, *, overlap: bool = True):
        self.padded_tokens = 0
        self.computed_tokens = 0
        self.progress: list[Progress] = []  # what the last call of `advance` returned
        self.took: dict[str, float] = {}  # its parts, in seconds
        self.num_tokens = 0  # of the step that it collected
        self._scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._depth = 2 if overlap else 1  # steps under way before the oldest is waited for
        self._pending: deque[tuple[StepPlan, Any]] = deque()  # (plan, executor's handle), oldest first

    @property
    def is_busy(self) -> bool:
        """Whether a step is under way."""
        return bool(self._pending)

    def now_s(self) -> float:
        """The time, as steps are planned by it."""
        return self._clock.now_s()

    def advance(self) -> list[Progress]:
        """Plan and dispatch a step, then wait for the oldest one, if there are enough or nothing can be planned.

        Raises:
          DeviceError: a step failed; `drop` says which were under way.
        """
        self.progress, self.num_tokens = [], 0
        began_s = self._clock.now_s()
        plan = self._scheduler.plan(began_s)
        planned_s = self._clock.now_s()
        self.took = {"plan": planned_s - began_s}
        if plan is not None:
            self._pending.append((plan, self._executor.dispatch(plan)))
            self.took["dispatch"] = self._clock.now_s() - planned_s
            if len(self._pending) < self._depth:
                return []
        if self._pending:
            self.progress = self._collect()
        return self.progress

    def drop(self) -> list[str]:
        """Forget the steps under way; returns whose rows they had."""
        seq_ids = [row.seq_id for plan, _ in self._pending for row in plan.rows]
        self._pending.clear()
        return seq_ids

    def _collect(self) -> list[Progress]:
        plan, handle = self._pending[0]
        began_s = self._clock.now_s()
        result = self._executor.collect(handle)
        came_s = self._clock.now_s()
        self._pending.popleft()
        self.num_tokens = plan.num_tokens
        self.padded_tokens += result.padded_tokens
        self.computed_tokens += self.num_tokens
        progress = self._scheduler.commit(plan, result, came_s)
        self.took |= {"wait": came_s - began_s, "commit": self._clock.now_s() - came_s}
        return progress
