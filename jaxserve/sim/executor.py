"""An executor without a device: steps take the time that a cost model says, on a virtual clock."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from jaxserve.clock import VirtualClock
from jaxserve.cost.model import CostModel
from jaxserve.cost.work import work_of
from jaxserve.executor.ladder import Rung, fit
from jaxserve.sim.record import Steps
from jaxserve.step import BlockSwap, Capacity, Load, RowResult, StepPlan, StepResult
from jaxserve.workload.call import END

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
    """One host thread, one device that runs steps in order, and a link each way between the device and host memory.

    `dispatch` takes the host's time for a step and lets the device begin when it is free; `collect` waits for the end
    of a step. So host time is hidden behind the device exactly where the engine's loop hides it. A step waits for the
    blocks that come back from host memory; those that leave are read at its start and travel while it runs.
    """

    def __init__(
        self,
        capacity: Capacity,
        ladder: tuple[Rung, ...],
        cost: CostModel,
        clock: VirtualClock,
        *,
        overlap: bool = True,
        compiles: bool = False,
        waits_for_swaps: bool = False,
    ):
        """`compiles`: the first step of each size stalls the host for a compilation; else all are compiled before.
        `waits_for_swaps`: a step begins when all its blocks have come and gone; no block travels while another step runs.
        """
        self.steps = Steps()
        self.collected_s = 0.0  # when the device began the step that was collected last
        self.answers: dict[str, Answer] = {}  # by sequence id; who starts a sequence adds its answer here
        self._capacity = capacity
        self._ladder = ladder
        self._cost = cost
        self._clock = clock
        self._waits_for_swaps = waits_for_swaps
        self._alone = 1.0 - cost.hidden if overlap else 0.0  # share of host time that nothing hides
        self._uncompiled = set(ladder) if compiles else set[Rung]()
        self._rungs: dict[tuple[int, int, bool], Rung] = {}
        self._free_s = 0.0  # when the device has done all that was dispatched
        self._out_s = self._in_s = 0.0  # when the links have
        self._left: dict[int, float] = {}  # block of host memory -> when its newest copy has arrived there
        self._back: dict[int, float] = {}  # ... -> when it is on the device again, of the latest prefetches

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
            host_s += self._alone * device_s
        else:
            device_s += self._alone * host_s
        steps = self.steps
        if rung in self._uncompiled:
            self._uncompiled.remove(rung)
            steps.stall_s += self._cost.compile_s
            host_s += self._cost.compile_s
        self._clock.advance(host_s)
        start_s = max(self._clock.now_s(), self._free_s)
        if plan.swap_ins or plan.swap_outs or plan.prefetches:
            start_s = self._move(plan, start_s)
        self._free_s = start_s + device_s
        steps.start_s.append(start_s)
        steps.end_s.append(self._free_s)
        steps.num_rows.append(num_rows)
        steps.num_tokens.append(num_tokens)
        steps.num_decodes.append(
            num_rows
            if work.is_decode
            else sum([row.start > 0 and len(row.token_ids) + row.feeds_last == 1 for row in rows])
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

    def _move(self, plan: StepPlan, start_s: float) -> float:
        """Put a plan's swaps on the links; returns when its step can begin."""
        cost, now_s = self._cost, self._clock.now_s()
        late = [swap for swap in plan.swap_ins if swap.host not in self._back]
        if late:  # nobody foresaw them
            self._bring(late, now_s)
        start_s = max([start_s, *(self._back[swap.host] for swap in plan.swap_ins)])
        if plan.swap_outs:
            self._out_s = max(self._out_s, start_s) + cost.swap_s(len(plan.swap_outs))
            self._left.update((swap.host, self._out_s) for swap in plan.swap_outs)
        self._back.clear()
        moved = len(plan.swap_outs) + len(late)
        if self._waits_for_swaps:
            start_s = max(start_s, self._out_s)
        elif plan.prefetches:
            self._bring(plan.prefetches, now_s)
            moved += len(plan.prefetches)
        self.steps.swapped_bytes += moved * cost.block_bytes
        return start_s

    def _bring(self, swaps: Iterable[BlockSwap], now_s: float) -> None:
        hosts = [swap.host for swap in swaps]
        left_s = max(self._left.get(host, 0.0) for host in hosts)
        self._in_s = max(self._in_s, now_s, left_s) + self._cost.swap_s(len(hosts))
        self._back.update(dict.fromkeys(hosts, self._in_s))

    def _results(self, plan: StepPlan) -> tuple[RowResult, ...]:
        answers, results = self.answers, list[RowResult]()
        for row in plan.rows:
            if row.samples:
                token, length = answers[row.seat.seq_id]
                results.append(token if row.output_index + 1 < length else _ENDED)
            else:
                results.append(_NOTHING)
        return tuple(results)

    def _rung(self, num_tokens: int, num_rows: int, is_prompt: bool) -> Rung:
        key = num_tokens, num_rows, is_prompt
        rung = self._rungs.get(key)
        if rung is None:
            rung = self._rungs[key] = fit(self._ladder, [Load(num_tokens, num_rows, is_prompt)])
        return rung
