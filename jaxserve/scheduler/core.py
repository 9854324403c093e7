"""The scheduler: each step, which sequences run and how many of their tokens. Host-only and deterministic.

One loop serves prefill, chunks and decodes (Sarathi-Serve, OSDI 2024, arXiv 2403.02310): running decodes first, then
prompts under way, then admissions in the policy's order, all under one token budget. Blocks are found by preempting
(recompute later) when the pool is full. A plan may be made while the step before it is still running: a token that is
sampled but not yet known counts as *pending*, and the device feeds it to itself.
"""

import dataclasses

from jaxserve.kv.store import KVStore
from jaxserve.request import Finish, Task
from jaxserve.scheduler.draft import Draft, make_row
from jaxserve.scheduler.policy import Policy
from jaxserve.scheduler.sequence import Sequence, State
from jaxserve.step import Capacity, Row, RowResult, SlotStart, StepPlan, StepResult


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """What a step did for one sequence. `result` is None when it ended without computing (an abort)."""

    sequence: Sequence
    row: Row | None
    result: RowResult | None
    finish: Finish | None


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals since the start."""

    steps: int = 0
    prompt_tokens: int = 0  # fed, recomputed ones included
    output_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that did not have to be fed
    preemptions: int = 0
    wasted_rows: int = 0  # computed for a sequence that had already ended


class Scheduler:
    """Queues of sequences over a KV store. Never sees an array."""

    def __init__(self, store: KVStore, policy: Policy, capacity: Capacity, *, token_budget: int, chunked: bool = True):
        self.store = store
        self.counters = Counters()
        self._policy = policy
        self._capacity = capacity
        self._token_budget = token_budget
        self._chunked = chunked
        self._watermark = max(1, capacity.num_blocks // 100)
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []  # in order of admission
        self._free_slots = list(range(capacity.num_slots - 1, -1, -1))

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with blocks."""
        return len(self._running)

    @property
    def running_ids(self) -> list[str]:
        """Which sequences have blocks, in order of admission."""
        return [sequence.seq_id for sequence in self._running]

    def add(self, sequence: Sequence, now_s: float) -> None:
        """Put a new sequence in the waiting queue. It must fit the pool alone (the caller has checked)."""
        self._sequences[sequence.seq_id] = sequence
        self._waiting.append(sequence)
        self._policy.on_arrival(sequence.view, now_s)

    def finish(self, sequence: Sequence, now_s: float) -> None:
        """End a sequence now and free what it holds. A step under way may still contain it; its row is ignored."""
        if sequence.state is State.FINISHED:
            return
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
            self._give_back(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.state = State.FINISHED
        del self._sequences[sequence.seq_id]
        self._policy.on_finish(sequence.view, now_s)

    def plan(self, now_s: float) -> StepPlan | None:
        """Choose the next step and account for it as if it had run. None: nothing can run now.

        Modifies queues and store; every planned row must be executed, and its result committed, in order.
        """
        draft = Draft(budget=self._token_budget)
        for sequence in tuple(self._running):  # decodes: every one, every step
            if sequence.num_left and not sequence.is_prefill:
                self._extend(draft, sequence, 1, now_s)
        for sequence in tuple(self._running):  # prompts under way, oldest first
            if sequence.num_left and sequence.is_prefill:
                self._extend(draft, sequence, self._chunk(draft, sequence), now_s)
        if not draft.preempted:  # what was just thrown out must not come back in the same step
            self._admit(draft, now_s)
        if self._chunked:
            draft.trim(self._capacity.token_rungs)
        if not draft.entries:
            return None
        rows = tuple(self._row(sequence, count) for sequence, count in draft.entries)
        self.counters.steps += 1
        return StepPlan(index=self.counters.steps, rows=rows, copies=tuple(draft.copies), starts=tuple(draft.starts))

    def commit(self, plan: StepPlan, result: StepResult, now_s: float) -> list[Progress]:
        """Take the results of a plan, in plan order. Sequences that reached an end token or their length are ended."""
        progress = []
        for row, outcome in zip(plan.rows, result.rows, strict=True):
            sequence = self._sequences.get(row.seq_id)
            if sequence is None:
                self.counters.wasted_rows += 1
                continue
            if row.samples and sequence.request.task is Task.GENERATE:
                assert outcome.token_id is not None
                sequence.num_pending -= 1
                sequence.tokens.append(outcome.token_id)
                sequence.view.num_output += 1
                self.counters.output_tokens += 1
            if sequence.state is State.RUNNING and sequence.epoch == row.epoch:
                self.store.register(row.seq_id, sequence.tokens[: row.start + row.num_tokens])
            decoded = int(row.samples)
            self._policy.charge(sequence.view, row.num_tokens - decoded, decoded)
            finish = _finish_of(sequence, row)
            if finish:
                self.finish(sequence, now_s)
            progress.append(Progress(sequence, row, outcome, finish))
        return progress

    def check(self) -> None:
        """Prove the books: store, slots, queues. For tests."""
        self.store.check()
        slots = [s.slot for s in self._running]
        assert len(set(slots)) == len(slots) and not set(slots) & set(self._free_slots), "slots are shared"
        assert len(slots) + len(self._free_slots) == self._capacity.num_slots, "slots leak"
        assert len(self._running) + len(self._waiting) == len(self._sequences), "sequences leak"

    def _extend(self, draft: Draft, sequence: Sequence, count: int, now_s: float) -> bool:
        """Draft `count` tokens of a running sequence, preempting others for its blocks if need be."""
        if count <= 0 or sequence.state is not State.RUNNING or (sequence.needs_host and sequence.num_pending):
            return False
        while not self.store.grow(sequence.seq_id, sequence.num_computed + count):
            drafted = {s.seq_id for s, _ in draft.entries}
            others = [s for s in self._running if s is not sequence and s.num_left and s.seq_id not in drafted]
            if not others:
                return False  # those drafted will end some day; a sequence always fits alone
            victim = self._policy.victim([s.view for s in others], now_s)
            self._preempt(self._sequences[victim.seq_id])
            draft.preempted = True
        draft.add(sequence, count)
        return True

    def _chunk(self, draft: Draft, sequence: Sequence) -> int:
        """How many tokens of a prompt go into this step."""
        if self._chunked or sequence.num_left <= draft.budget_left:
            return min(sequence.num_left, draft.budget_left)
        return 0

    def _admit(self, draft: Draft, now_s: float) -> None:
        for view in self._policy.order([s.view for s in self._waiting], now_s):
            sequence = self._sequences[view.seq_id]
            if not self._free_slots or draft.budget_left <= 0:
                break
            if sequence.num_pending or not sequence.wants_more or _awaits_parent(sequence):
                continue
            if not self._open(draft, sequence):
                break
            self._waiting.remove(sequence)
            self._running.append(sequence)
            sequence.state = State.RUNNING
            sequence.slot = self._free_slots.pop()
            if sequence.request.params.has_edits:
                draft.starts.append(_slot_start(sequence))
            self._extend(draft, sequence, self._chunk(draft, sequence), now_s)

    def _open(self, draft: Draft, sequence: Sequence) -> bool:
        """Give a waiting sequence a table: its parent's prompt, a cached prefix, or an empty one. False: no room yet."""
        parent, request, copies = sequence.parent, sequence.request, []
        if parent is not None and parent.state is State.RUNNING and not sequence.num_output:
            shared = (
                sequence.num_prompt - 1
            )  # the last prompt token is fed again: its logits give the first answer token
            forked = self.store.fork(parent.seq_id, sequence.seq_id, shared)
            if forked is None:
                return False
            cached, copies = shared, forked
        else:
            limit = len(sequence.tokens) - 1 if request.task is Task.GENERATE else sequence.num_prompt - 1
            if request.logprobs_from is not None and sequence.num_scored < sequence.num_prompt:
                limit = min(limit, request.logprobs_from - 1)
            cached = self.store.open(sequence.seq_id, sequence.tokens, request.namespace, limit=max(limit, 0))
        if self._running and self._missing_blocks(sequence) + self._promised() > self.store.num_available:
            self.store.release(sequence.seq_id)
            return False
        self.store.touch(sequence.seq_id)
        draft.copies.extend(copies)
        sequence.num_computed = cached
        sequence.num_cached = max(sequence.num_cached, min(cached, sequence.num_prompt))
        self.counters.cached_tokens += cached
        return True

    def _missing_blocks(self, sequence: Sequence) -> int:
        return self.store.blocks_for(sequence.num_total + 1) - len(self.store.table(sequence.seq_id))

    def _promised(self) -> int:
        """Blocks that prompts under way will still need, and a margin against preempting at once."""
        return self._watermark + sum(max(self._missing_blocks(s), 0) for s in self._running if s.is_prefill)

    def _row(self, sequence: Sequence, count: int) -> Row:
        row = make_row(sequence, count, self.store.table(sequence.seq_id))
        if row.logprob_targets is not None:
            sequence.num_scored = row.start + count + 1
        sequence.num_computed += count
        if row.samples and sequence.request.task is Task.GENERATE:
            sequence.num_pending += 1
        self.counters.prompt_tokens += count if count > 1 or row.start < sequence.num_prompt else 0
        return row

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks away; it starts over, from whatever the prefix cache still has, ahead of others."""
        self._running.remove(sequence)
        self._give_back(sequence)
        sequence.state = State.WAITING
        sequence.num_computed = 0
        sequence.epoch += 1
        sequence.view.num_preemptions += 1
        self._waiting.insert(0, sequence)
        self.counters.preemptions += 1

    def _give_back(self, sequence: Sequence) -> None:
        self.store.release(sequence.seq_id)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1


def _awaits_parent(sequence: Sequence) -> bool:
    """Whether the sequence's prompt is being computed by its sibling right now, or soon will be."""
    parent = sequence.parent
    if parent is None or sequence.num_output or parent.state is State.FINISHED:
        return False
    return parent.num_computed < parent.num_prompt


def _finish_of(sequence: Sequence, row: Row) -> Finish | None:
    request = sequence.request
    if request.task is not Task.GENERATE:
        return Finish.STOP if row.start + row.num_tokens >= sequence.num_prompt else None
    if not row.samples:
        return None
    token, params = sequence.tokens[-1], request.params
    if token in params.stop_token_ids or (token in request.eos_token_ids and not params.ignore_eos):
        return Finish.STOP
    return Finish.LENGTH if len(sequence.tokens) >= sequence.max_len else None


def _slot_start(sequence: Sequence) -> SlotStart:
    prompt = sequence.request.prompt_token_ids
    return SlotStart(
        slot=sequence.slot,
        params=sequence.request.params,
        prompt_token_ids=prompt,
        output_token_ids=tuple(sequence.tokens[len(prompt) :]),
    )
