"""The scheduler: each step, which sequences run and how many of their tokens. Host-only and deterministic.

One loop serves prefill, chunks and decodes (Sarathi-Serve, OSDI 2024, arXiv 2403.02310): running decodes first, then
prompts under way, then admissions in the policy's order, all under one token budget. Blocks are found by preempting
(recompute later) when the pool is full. A plan may be made while the step before it is still running: a token that is
sampled but not yet known counts as *pending*, and the device feeds it to itself.

Replicas of the weights run each step together. There is one queue for all of them; budget, blocks and slots are counted
for each (`replica.py`), and `placement.py` says who takes the next sequence.
"""

import dataclasses
from collections.abc import Sequence as Seq

from jaxserve.kv.store import KVStore
from jaxserve.request import Finish, Task
from jaxserve.scheduler.draft import Draft, make_row, trim
from jaxserve.scheduler.placement import Offer, rank
from jaxserve.scheduler.policy import Policy
from jaxserve.scheduler.replica import Replica
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
    replica_tokens: list[int] = dataclasses.field(default_factory=list)  # fed on each replica: how even their loads are


class Scheduler:
    """Queues of sequences over the KV stores of all replicas. Never sees an array. `token_budget` is each replica's."""

    def __init__(
        self, stores: Seq[KVStore], policy: Policy, capacity: Capacity, *, token_budget: int, chunked: bool = True
    ):
        if len(stores) != capacity.num_replicas:
            raise ValueError(f"{len(stores)} stores for {capacity.num_replicas} replicas")
        self.counters = Counters(replica_tokens=[0] * capacity.num_replicas)
        self._replicas = tuple(Replica(index, store, capacity.num_slots) for index, store in enumerate(stores))
        self._policy = policy
        self._capacity = capacity
        self._token_budget = token_budget
        self._chunked = chunked
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []

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
        """Which sequences have blocks, in order of admission to each replica."""
        return [sequence.seq_id for sequence in self._running]

    @property
    def num_held_blocks(self) -> int:
        """Blocks of all replicas in some sequence's table."""
        return sum(replica.store.num_held for replica in self._replicas)

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
            self._replicas[sequence.replica].dismiss(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.state = State.FINISHED
        del self._sequences[sequence.seq_id]
        self._policy.on_finish(sequence.view, now_s)

    def clear_cache(self) -> None:
        """Forget every cached block that no sequence holds."""
        for replica in self._replicas:
            replica.store.clear_cache()

    def plan(self, now_s: float) -> StepPlan | None:
        """Choose the next step and account for it as if it had run. None: nothing can run now.

        Modifies queues and store; every planned row must be executed, and its result committed, in order.
        """
        drafts = [Draft(budget=self._token_budget) for _ in self._replicas]
        for replica, draft in zip(self._replicas, drafts, strict=True):
            for sequence in tuple(replica.running):  # decodes: every one, every step
                if sequence.num_left and not sequence.is_prefill:
                    self._extend(draft, sequence, 1, now_s)
            for sequence in tuple(replica.running):  # prompts under way, oldest first
                if sequence.num_left and sequence.is_prefill:
                    self._extend(draft, sequence, self._chunk(draft, sequence), now_s)
        self._admit(drafts, now_s)
        if self._chunked:
            trim(drafts, self._capacity.token_rungs)
        rows = tuple(self._row(sequence, count) for draft in drafts for sequence, count in draft.entries)
        if not rows:
            return None
        self.counters.steps += 1
        copies = tuple(copy for draft in drafts for copy in draft.copies)
        starts = tuple(start for draft in drafts for start in draft.starts)
        return StepPlan(index=self.counters.steps, rows=rows, copies=copies, starts=starts)

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
                store = self._replicas[row.replica].store
                store.register(row.seq_id, sequence.tokens[: row.start + row.num_tokens])
            decoded = int(row.samples)
            self._policy.charge(sequence.view, row.num_tokens - decoded, decoded)
            finish = _finish_of(sequence, row)
            if finish:
                self.finish(sequence, now_s)
            progress.append(Progress(sequence, row, outcome, finish))
        return progress

    def check(self) -> None:
        """Prove the books: stores, slots, queues. For tests."""
        for replica in self._replicas:
            replica.check()
        known = [s.seq_id for s in (*self._running, *self._waiting)]
        assert sorted(known) == sorted(self._sequences), "sequences leak, or run twice"

    @property
    def _running(self) -> list[Sequence]:
        return [sequence for replica in self._replicas for sequence in replica.running]

    def _extend(self, draft: Draft, sequence: Sequence, count: int, now_s: float) -> bool:
        """Draft `count` tokens of a running sequence, preempting others of its replica for blocks if need be."""
        if count <= 0 or sequence.state is not State.RUNNING or (sequence.needs_host and sequence.num_pending):
            return False
        replica = self._replicas[sequence.replica]
        while not replica.store.grow(sequence.seq_id, sequence.num_computed + count):
            drafted = {s.seq_id for s, _ in draft.entries}
            others = [s for s in replica.running if s is not sequence and s.num_left and s.seq_id not in drafted]
            if not others:
                return False  # those drafted will end some day; a sequence always fits alone
            victim = self._policy.victim([s.view for s in others], now_s)
            self._preempt(self._sequences[victim.seq_id])
            draft.is_closed = True  # nobody takes the place of who was just thrown out
        draft.add(sequence, count)
        return True

    def _chunk(self, draft: Draft, sequence: Sequence) -> int:
        """How many tokens of a prompt go into this step."""
        if self._chunked or sequence.num_left <= draft.budget_left:
            return min(sequence.num_left, draft.budget_left)
        return 0

    def _admit(self, drafts: Seq[Draft], now_s: float) -> None:
        """Send waiting sequences to replicas, in the policy's order."""
        if all(draft.is_closed for draft in drafts):
            return
        for view in self._policy.order([s.view for s in self._waiting], now_s):
            sequence = self._sequences[view.seq_id]
            vacant = [r for r in self._replicas if r.has_slot and drafts[r.index].may_admit]
            if not vacant:
                break
            if sequence.num_pending or not sequence.wants_more or _awaits_parent(sequence):
                continue
            draft = self._place(drafts, self._choices(vacant, sequence), sequence)
            if draft is not None:
                self._extend(draft, sequence, self._chunk(draft, sequence), now_s)

    def _choices(self, vacant: list[Replica], sequence: Sequence) -> list[Replica]:
        """Where a waiting sequence may go.

        Answers of one request go where the first of them runs, because the prompt is there. Only when all slots there
        are taken they go elsewhere, and then the first to come computes the prompt for those that follow.
        """
        parent = sequence.parent
        if parent is None or parent.state is not State.RUNNING or sequence.num_output:
            return vacant
        home = self._replicas[parent.replica]
        if home.has_slot:
            return [replica for replica in vacant if replica is home]
        return [replica for replica in vacant if not replica.is_feeding(sequence.request)]

    def _place(self, drafts: Seq[Draft], choices: list[Replica], sequence: Sequence) -> Draft | None:
        """Admit a sequence to the best replica that has blocks for it. If none has, nobody overtakes it there."""
        for replica in self._ranked(choices, sequence):
            copies = replica.admit(sequence)
            if copies is None:
                continue
            draft = drafts[replica.index]
            draft.copies.extend(copies)
            if sequence.request.params.has_edits:
                draft.starts.append(_slot_start(sequence))
            self._waiting.remove(sequence)
            self.counters.cached_tokens += sequence.num_computed
            return draft
        for replica in choices:
            drafts[replica.index].is_closed = True
        return None

    def _ranked(self, choices: list[Replica], sequence: Sequence) -> list[Replica]:
        """Best first. This asks the prefix index: how much of the sequence each of the replicas holds."""
        if len(choices) < 2:
            return choices
        offers = [Offer(r.index, len(r.running), r.num_ahead, r.cached(sequence)) for r in choices]
        return [self._replicas[offer.replica] for offer in rank(offers, self._capacity.num_slots)]

    def _row(self, sequence: Sequence, count: int) -> Row:
        row = make_row(sequence, count, self._replicas[sequence.replica].store.table(sequence.seq_id))
        if row.logprob_targets is not None:
            sequence.num_scored = row.start + count + 1
        sequence.num_computed += count
        if row.samples and sequence.request.task is Task.GENERATE:
            sequence.num_pending += 1
        self.counters.prompt_tokens += count if count > 1 or row.start < sequence.num_prompt else 0
        self.counters.replica_tokens[row.replica] += count
        return row

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks away; it starts over, from whatever the prefix cache still has, ahead of others."""
        self._replicas[sequence.replica].dismiss(sequence)
        sequence.state = State.WAITING
        sequence.num_computed = 0
        sequence.epoch += 1
        sequence.view.num_preemptions += 1
        self._waiting.insert(0, sequence)
        self.counters.preemptions += 1


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
        replica=sequence.replica,
        slot=sequence.slot,
        params=sequence.request.params,
        prompt_token_ids=prompt,
        output_token_ids=tuple(sequence.tokens[len(prompt) :]),
    )
