"""An executor without a device: steps take the time that a cost model says, on a virtual clock."""

from typing import Any, NamedTuple

from jaxserve.clock import VirtualClock
from jaxserve.cost.model import CostModel
from jaxserve.cost.work import work_of
from jaxserve.executor.ladder import Rung, fit
from jaxserve.sim.call import END
from jaxserve.sim.record import Steps
from jaxserve.step import Capacity, Load, RowResult, StepPlan, StepResult

_NOTHING = RowResult()
_ENDED = RowResult(token_id=END)


class Answer(NamedTuple):
    """What will be written: `length` tokens, all the same but for the end token."""

    token: RowResult  # shared by all of them
    length: int


class Pending(NamedTuple):
    """A step under way."""

    start_s: float
    end_s: float
    result: StepResult


class SimExecutor:
    """One host thread and one device that runs steps in order.

    `dispatch` takes the host's time for a step and lets the device begin when it is free; `collect` waits for the end
    of a step. So host time is hidden behind the device exactly where the engine's loop hides it.
    """

    def __init__(
        self,
        capacity: Capacity,
        ladder: tuple[Rung, ...],
        cost: CostModel,
        clock: VirtualClock,
        *,
        overlap: bool = True,
    ):
        self.steps = Steps()
        self.collected_s = 0.0  # when the device began the step that was collected last
        self.answers: dict[str, Answer] = {}  # by sequence id; who starts a sequence adds its answer here
        self._capacity = capacity
        self._ladder = ladder
        self._cost = cost
        self._clock = clock
        self._shared = 1.0 - cost.hidden if overlap else 0.0
        self._rungs: dict[tuple[int, int, bool], Rung] = {}
        self._free_s = 0.0  # when the device has done all that was dispatched

    def capacity(self) -> Capacity:
        """What fits."""
        return self._capacity

    def dispatch(self, plan: StepPlan) -> Pending:
        """Let the host's part pass, and put the step behind those under way."""
        rows = plan.rows
        num_rows = len(rows)
        num_tokens = sum([len(row.token_ids) + row.feeds_last for row in rows])
        rung = self._rung(num_tokens, num_rows, num_rows == 1 and not rows[0].start)
        work = work_of(rows, rung.tokens, rung.rows)
        device_s, host_s = self._cost.device_s(work), self._cost.host_s(work)
        # What cannot pass at the same time lengthens the longer one.
        if device_s < host_s:
            host_s += self._shared * device_s
        else:
            device_s += self._shared * host_s
        self._clock.advance(host_s)
        start_s = max(self._clock.now_s(), self._free_s)
        self._free_s = start_s + device_s
        steps = self.steps
        steps.start_s.append(start_s)
        steps.end_s.append(self._free_s)
        steps.num_rows.append(num_rows)
        steps.num_tokens.append(num_tokens)
        steps.num_decodes.append(
            num_rows if num_rows == num_tokens else sum([len(row.token_ids) + row.feeds_last == 1 for row in rows])
        )
        steps.num_padded.append(rung.tokens - num_tokens)
        steps.sign(plan)
        return Pending(
            start_s, self._free_s, StepResult(rows=self._results(plan), padded_tokens=rung.tokens - num_tokens)
        )

    def collect(self, pending: Any) -> StepResult:
        """Wait for the end of a step."""
        self.collected_s = pending.start_s
        self._clock.advance(max(pending.end_s - self._clock.now_s(), 0.0))
        return pending.result

    def _results(self, plan: StepPlan) -> tuple[RowResult, ...]:
        answers, results = self.answers, list[RowResult]()
        for row in plan.rows:
            if row.samples:
                answer = answers[row.seq_id]
                results.append(answer.token if row.output_index + 1 < answer.length else _ENDED)
            else:
                results.append(_NOTHING)
        return tuple(results)

    def _rung(self, num_tokens: int, num_rows: int, is_prompt: bool) -> Rung:
        key = num_tokens, num_rows, is_prompt
        rung = self._rungs.get(key)
        if rung is None:
            rung = self._rungs[key] = fit(self._ladder, [Load(num_tokens, num_rows, is_prompt)])
        return rung
