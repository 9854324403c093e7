"""One simulated replica: the real scheduler, KV store and loop over a SimExecutor, with a clock of its own."""

import dataclasses
from collections.abc import Sequence as Seq
from typing import NamedTuple

from jaxserve.clock import Clock, VirtualClock
from jaxserve.cluster.snapshot import Snapshot
from jaxserve.cost.model import CostModel
from jaxserve.executor.ladder import Rung, build_ladder, token_rungs
from jaxserve.kv.store import KVStore
from jaxserve.pipeline import Pipeline
from jaxserve.request import Request
from jaxserve.scheduler.core import Scheduler
from jaxserve.scheduler.policy import Policy
from jaxserve.scheduler.progress import Progress
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.swap import swap_rule
from jaxserve.sim.executor import Answer, SimExecutor
from jaxserve.step import Capacity, RowResult

_GUESSED_TOKENS = 256  # of an answer, before one of its stage has ended
_RECENT = 0.05  # weight of the newest answer in the guess


class _Work(NamedTuple):
    """What a request is estimated to take, when it comes."""

    prefill_s: float
    token_s: float
    num_tokens: int  # of the answer

    def left_s(self, fed: float, num_output: int) -> float:
        """When a share of the prompt is fed, and some of the answer is there."""
        return self.prefill_s * (1.0 - fed) + self.token_s * max(self.num_tokens - num_output, 0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaSpec:
    """What one replica is: sizes as the engine would have them, and what its steps cost."""

    cost: CostModel
    num_blocks: int
    block_size: int = 32
    max_num_seqs: int = 32
    token_budget: int = 2048
    max_model_len: int = 131_072
    num_host_blocks: int = 0  # room in host memory for blocks that are swapped out
    preemption_mode: str = "auto"
    sequence_shards: int = 1  # devices that share a step's tokens
    client_quota: int | None = None
    chunked: bool = True
    caching: bool = True
    overlap: bool = True
    compiles: bool = False  # while it serves, rather than before
    waits_for_swaps: bool = False  # no step runs while blocks travel
    engine_type: str = ""  # replicas of one type are equally fast

    @property
    def ladder(self) -> tuple[Rung, ...]:
        """Compiled steps."""
        return build_ladder(self.max_num_seqs, self.token_budget, self.sequence_shards)

    @property
    def capacity(self) -> Capacity:
        """What fits."""
        return Capacity(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            num_slots=self.max_num_seqs,
            token_rungs=token_rungs(self.ladder),
            max_model_len=self.max_model_len,
            num_host_blocks=self.num_host_blocks if self.preemption_mode != "recompute" else 0,
        )


class Replica:
    """Takes requests, and runs one step after the other. Time passes only in `advance` and `idle_until`."""

    def __init__(self, index: int, spec: ReplicaSpec, policy: Policy):
        ladder, capacity = spec.ladder, spec.capacity
        self.index = index
        self.spec = spec
        self._time = VirtualClock()
        self.clock: Clock = self._time
        self.store = KVStore(spec.num_blocks, spec.block_size, caching=spec.caching)
        self.scheduler = Scheduler(
            [self.store],
            policy,
            capacity,
            token_budget=spec.token_budget,
            chunked=spec.chunked,
            swap_rule=swap_rule(spec.preemption_mode, spec.cost),
            client_quota=spec.client_quota,
        )
        self.executor = SimExecutor(
            capacity,
            ladder,
            spec.cost,
            self._time,
            overlap=spec.overlap,
            compiles=spec.compiles,
            waits_for_swaps=spec.waits_for_swaps,
        )
        self._answers = self.executor.answers
        self._pipeline = Pipeline(self.scheduler, self.executor, self._time, overlap=spec.overlap)
        self._work: dict[str, _Work] = {}  # of sequences that have not ended
        self._guesses: dict[str, float] = {}  # answers' lengths, by stage
        self._num_accepted = 0

    @property
    def has_work(self) -> bool:
        """Whether a sequence has not ended, or a step is under way."""
        return bool(self._work) or self._pipeline.is_busy

    @property
    def is_stepping(self) -> bool:
        """Whether a step is under way."""
        return self._pipeline.is_busy

    def idle_until(self, now_s: float) -> None:
        """Wait for work."""
        self._time.advance(max(now_s - self._time.now_s(), 0.0))

    def add(self, request: Request, token: RowResult, length: int) -> str:
        """Queue a request whose answer is known: `length` tokens, the last one the end token. Returns its sequence id."""
        self.idle_until(request.arrival_s)
        self._num_accepted += 1
        seq_id = f"{request.request_id}/0#{self._num_accepted}"  # as the engine calls it
        limit, max_tokens = self.spec.max_model_len, request.params.max_tokens
        sequence = Sequence(
            seq_id=seq_id,
            request=request,
            seed=0,
            max_len=limit if max_tokens is None else min(limit, len(request.prompt_token_ids) + max_tokens),
            arrival_s=request.arrival_s,
        )
        self._answers[seq_id] = Answer(token, length)
        self._work[seq_id] = self._estimate(request)
        self.scheduler.add(sequence, self._pipeline.now_s())
        return seq_id

    def advance(self) -> list[Progress]:
        """One turn of the loop."""
        return self._pipeline.advance()

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        del self._work[sequence.seq_id], self._answers[sequence.seq_id]
        stage, length = sequence.request.stage, len(sequence.tokens) - sequence.num_prompt
        guess = self._guesses.setdefault(stage, float(length))
        self._guesses[stage] = guess + _RECENT * (length - guess)

    def service_s(self, request: Request) -> float:
        """Seconds to serve a request alone, for an answer as long as the latest ones of its stage were here. Its true length
        is not asked."""
        work = self._estimate(request)
        return work.prefill_s + work.token_s * work.num_tokens

    def _estimate(self, request: Request) -> _Work:
        cost, num_prompt = self.spec.cost, len(request.prompt_token_ids)
        num_tokens = max(round(self._guesses.get(request.stage, _GUESSED_TOKENS)), 1)
        prefill_s = cost.service_s(num_prompt, 1)
        return _Work(prefill_s, (cost.service_s(num_prompt, num_tokens) - prefill_s) / num_tokens, num_tokens)

    def snapshot(self, now_s: float) -> Snapshot:
        """What a router may know. A step under way counts as it was planned."""
        spec, store = self.spec, self.store
        waiting, (books,) = self.scheduler.waiting, self.scheduler.replicas
        blocks = [store.blocks_for(view.num_prompt + view.num_output + 1) for view in waiting]
        views = [*waiting, *(sequence.view for sequence in books.running)]
        return Snapshot(
            replica=self.index,
            time_s=now_s,
            num_accepted=self._num_accepted,
            engine_type=spec.engine_type,
            num_slots=spec.max_num_seqs,
            num_blocks=spec.num_blocks,
            block_size=spec.block_size,
            num_free=store.num_available,
            num_running=len(books.running),
            num_waiting=len(waiting),
            num_urgent=sum(view.request.priority < 0 for view in views),
            waiting_blocks=sum(blocks),
            first_waiting_blocks=blocks[0] if blocks else 0,
            queued_tokens=books.num_ahead + sum(view.num_prompt for view in waiting),
            work_s=sum(self._work[view.seq_id].left_s(0.0, view.num_output) for view in waiting)
            + sum(self._left_s(sequence) for sequence in books.running),
            cached=self._cached,
            service_s=self.service_s,
        )

    def _left_s(self, sequence: Sequence) -> float:
        fed = min(sequence.num_computed / sequence.num_prompt, 1.0)
        return self._work[sequence.seq_id].left_s(fed, sequence.view.num_output)

    def _cached(self, tokens: Seq[int], namespace: str) -> int:
        return self.store.cached(tokens, namespace, limit=max(len(tokens) - 1, 0))
