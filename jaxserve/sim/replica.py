"""One simulated replica: the real scheduler and the real KV store over a SimExecutor, with a clock of its own."""

import dataclasses
from collections import deque
from collections.abc import Sequence as Seq

from jaxserve.clock import VirtualClock
from jaxserve.cluster.snapshot import Snapshot
from jaxserve.cost.model import CostModel
from jaxserve.executor.ladder import build_ladder
from jaxserve.kv.store import KVStore
from jaxserve.request import Request
from jaxserve.scheduler.core import Progress, Scheduler
from jaxserve.scheduler.policy import Policy, View
from jaxserve.scheduler.sequence import Sequence
from jaxserve.sim.executor import Answer, Pending, SimExecutor
from jaxserve.step import Capacity, RowResult, StepPlan

_GUESSED_TOKENS = 256  # of an answer, before one has ended
_RECENT = 0.05  # weight of the newest answer in the guess


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaSpec:
    """What one replica is: sizes as the engine would have them, and what its steps cost."""

    cost: CostModel
    num_blocks: int
    block_size: int = 32
    max_num_seqs: int = 32
    token_budget: int = 2048
    max_model_len: int = 131_072
    sequence_shards: int = 1  # devices that share a step's tokens
    chunked: bool = True
    caching: bool = True
    overlap: bool = True
    engine_type: str = ""


class Replica:
    """Takes requests, and runs one step after the other. Time passes only in `advance` and `idle_until`."""

    def __init__(self, index: int, spec: ReplicaSpec, policy: Policy):
        ladder = build_ladder(spec.max_num_seqs, spec.token_budget, spec.sequence_shards)
        rungs = tuple(sorted({rung.tokens for rung in ladder}))
        capacity = Capacity(spec.num_blocks, spec.block_size, spec.max_num_seqs, rungs, spec.max_model_len)
        self.index = index
        self.spec = spec
        self.clock = VirtualClock()
        self.store = KVStore(spec.num_blocks, spec.block_size, caching=spec.caching)
        self.scheduler = Scheduler([self.store], policy, capacity, token_budget=spec.token_budget, chunked=spec.chunked)
        self.executor = SimExecutor(capacity, ladder, spec.cost, self.clock, overlap=spec.overlap)
        self._pending: deque[tuple[StepPlan, Pending]] = deque()
        self._live: dict[str, Sequence] = {}
        self._work_s: dict[str, float] = {}
        self._guess = float(_GUESSED_TOKENS)

    @property
    def has_work(self) -> bool:
        """Whether a sequence has not ended, or a step is under way."""
        return bool(self._live or self._pending)

    def idle_until(self, now_s: float) -> None:
        """Wait for work."""
        self.clock.advance(max(now_s - self.clock.now_s(), 0.0))

    def add(self, request: Request, seq_id: str, token: RowResult, length: int, arrival_s: float) -> Sequence:
        """Queue a request whose answer is known: `length` tokens, the last of them the end token."""
        self.idle_until(arrival_s)
        params, num_prompt = request.params, len(request.prompt_token_ids)
        limit = self.spec.max_model_len if params.max_tokens is None else num_prompt + params.max_tokens
        sequence = Sequence(
            seq_id=seq_id,
            request=request,
            seed=0,
            max_len=min(limit, self.spec.max_model_len),
            view=View(seq_id, request, arrival_s, num_prompt),
            tokens=list(request.prompt_token_ids),
        )
        self.executor.answers[seq_id] = Answer(token, length)
        self._live[seq_id] = sequence
        self._work_s[seq_id] = self.service_s(request)
        self.scheduler.add(sequence, self.clock.now_s())
        return sequence

    def advance(self) -> list[Progress]:
        """Plan and dispatch a step, and collect the one before it; what the engine's `step` does."""
        plan = self.scheduler.plan(self.clock.now_s())
        if plan is not None:
            self._pending.append((plan, self.executor.dispatch(plan)))
            if self.spec.overlap and len(self._pending) < 2:
                return []
        if not self._pending:
            return []
        plan, handle = self._pending[0]
        result = self.executor.collect(handle)
        self._pending.popleft()
        return self.scheduler.commit(plan, result, self.clock.now_s())

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        seq_id = sequence.seq_id
        del self._live[seq_id], self._work_s[seq_id]
        self._guess += _RECENT * (len(sequence.tokens) - sequence.num_prompt - self._guess)

    def service_s(self, request: Request) -> float:
        """Seconds to serve a request alone, for an answer as long as the latest ones were. Its true length is not
        asked."""
        return self.spec.cost.service_s(len(request.prompt_token_ids), round(self._guess))

    def snapshot(self, now_s: float) -> Snapshot:
        """What a router may know. Requests that ended in a step under way count until its end."""
        spec, store = self.spec, self.store
        waiting = [s for s in self._live.values() if s.slot < 0]
        blocks = [store.blocks_for(s.num_total + 1) for s in waiting]
        return Snapshot(
            replica=self.index,
            time_s=now_s,
            engine_type=spec.engine_type,
            num_slots=spec.max_num_seqs,
            num_blocks=spec.num_blocks,
            block_size=spec.block_size,
            num_free=store.num_available,
            num_running=len(self._live) - len(waiting),
            num_waiting=len(waiting),
            num_urgent=sum(s.request.priority < 0 for s in self._live.values()),
            waiting_blocks=sum(blocks),
            first_waiting_blocks=blocks[0] if blocks else 0,
            queued_tokens=sum(max(s.num_prompt - s.num_computed, 0) for s in self._live.values()),
            work_s=sum(self._work_s.values()),
            cached=self._cached,
            service_s=self.service_s,
        )

    def _cached(self, tokens: Seq[int], namespace: str) -> int:
        return self.store.cached(tokens, namespace, limit=max(len(tokens) - 1, 0))
