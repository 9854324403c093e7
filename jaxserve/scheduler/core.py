"""The scheduler: each step, which sequences run and how many of their tokens. Host-only and deterministic.

One loop serves prefill, chunks and decodes (Sarathi-Serve, OSDI 2024, arXiv 2403.02310): running decodes first, then
prompts under way, then admissions in the policy's order, all under one token budget. Blocks are found by preempting when
the pool is full: who is preempted starts over from what is cached, or comes back from host memory (`replica.py`). A plan may
be made while the step before it is still running: a token that is sampled but not yet known counts as *pending*, and the
device feeds it to itself.

Replicas of the weights run each step together. There is one queue for all of them; budget, blocks and slots are counted
for each (`replica.py`), and `placement.py` says who takes the next sequence.
"""

import functools
from collections.abc import Sequence as Seq

from jaxserve.kv.store import KVStore
from jaxserve.request import Task
from jaxserve.scheduler.account import Account, Accounts
from jaxserve.scheduler.draft import Draft, make_row, slot_start, trim
from jaxserve.scheduler.placement import choices, ranked
from jaxserve.scheduler.policy import Decodes, Policy, View
from jaxserve.scheduler.progress import Counters, Progress, finish_of
from jaxserve.scheduler.replica import Arrival, Replica, SwapRule
from jaxserve.scheduler.sequence import Sequence, State
from jaxserve.step import Capacity, Row, StepPlan, StepResult


class Scheduler:
    """Queues of sequences over the KV stores of all replicas. Never sees an array."""

    def __init__(
        self,
        stores: Seq[KVStore],
        policy: Policy,
        capacity: Capacity,
        *,
        token_budget: int,
        chunked: bool = True,
        swap_rule: SwapRule = lambda num_blocks, num_tokens: True,
        client_quota: int | None = None,
    ):
        """`token_budget` is each replica's. `swap_rule`: whether to swap a preempted sequence, where there is room for it.
        `client_quota`: most sequences of one client that run at once."""
        if len(stores) != capacity.num_replicas:
            raise ValueError(f"{len(stores)} stores for {capacity.num_replicas} replicas")
        self.counters = Counters(replica_tokens=[0] * capacity.num_replicas)
        self.accounts = Accounts()
        self._replicas = tuple(Replica(index, store, capacity, swap_rule) for index, store in enumerate(stores))
        self._policy = policy
        self._displaces = type(policy).displaced is not Policy.displaced
        self._capacity = capacity
        self._token_budget = token_budget
        self._chunked = chunked
        self._client_quota = client_quota
        self._sequences: dict[str, Sequence] = {}
        self._accounts: dict[str, Account] = {}  # of each sequence
        self._waiting: list[View] = []

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with blocks."""
        return sum(len(replica.running) for replica in self._replicas)

    @property
    def running_ids(self) -> list[str]:
        """Which sequences have blocks, in order of admission to each replica."""
        return [sequence.seq_id for sequence in self._running]

    @property
    def num_held_blocks(self) -> int:
        """Blocks of all replicas in some sequence's table, or pinned."""
        return sum(replica.store.num_held for replica in self._replicas)

    @property
    def waiting(self) -> Seq[View]:
        """Who waits, for snapshots of the load. Read-only."""
        return self._waiting

    @property
    def replicas(self) -> Seq[Replica]:
        """The books of each replica, for snapshots of the load. Read-only."""
        return self._replicas

    def add(self, sequence: Sequence, now_s: float) -> None:
        """Put a new sequence in the waiting queue. It must fit the pool alone (the caller has checked)."""
        account = self.accounts.of(sequence.request.client)
        account.sequences += 1
        self._accounts[sequence.seq_id] = account
        self._sequences[sequence.seq_id] = sequence
        self._waiting.append(sequence.view)
        lookups = [functools.partial(replica.cached, sequence) for replica in self._replicas]
        sequence.view.watch_cache(lookups[0] if len(lookups) == 1 else lambda: max([look() for look in lookups]))
        self._policy.on_arrival(sequence.view, now_s)

    def finish(self, sequence: Sequence, now_s: float) -> None:
        """A sequence has come to its end: free what it holds. A step under way may still contain it; its row is ignored."""
        if sequence.state is not State.FINISHED:
            if sequence.state is State.RUNNING and self._policy.keeps_copy(sequence.view):
                self._replicas[sequence.replica].keep_copy(sequence)
            self._remove(sequence).finished += 1
            self._policy.on_finish(sequence.view, now_s)

    def abort(self, sequence: Sequence, now_s: float) -> None:
        """End a sequence before its end, like `finish`."""
        if sequence.state is not State.FINISHED:
            self._remove(sequence).aborted += 1
            self._policy.on_abort(sequence.view, now_s)

    def set_priority(self, sequence: Sequence, priority: float) -> None:
        """Change a sequence's priority, for policies that go by it; it holds from the next plan on."""
        sequence.view.priority = priority

    def end_program(self, program: str, now_s: float) -> None:
        """No more requests of this program will come; policies may forget what they know of it."""
        self._policy.on_program_end(program, now_s)

    def unpin(self, name: str) -> None:
        """Let the prefix that requests have pinned under this name be evicted."""
        for replica in self._replicas:
            replica.unpin(name)

    def clear_cache(self) -> None:
        """The pools are lost: forget every block that no running sequence holds, in host memory too."""
        for view in self._waiting:
            sequence = self._sequences[view.seq_id]
            self._replicas[sequence.replica].forget(sequence)
        for replica in self._replicas:
            replica.clear()

    def plan(self, now_s: float) -> StepPlan | None:
        """Choose the next step and account for it as if it had run. None: nothing can run now.

        Modifies queues and store; every planned row must be executed, and its result committed, in order.
        """
        self._policy.tick(now_s)
        drafts = [self._draft(replica, now_s) for replica in self._replicas]
        if self._waiting:
            self._admit(drafts, now_s)
        if not any(draft.entries for draft in drafts):
            self._draft_arrivals(drafts, now_s)
        if self._chunked:
            for sequence, excess in trim(drafts, self._capacity.token_rungs):
                self._policy.charge(sequence.view, -excess, 0)
        rows = tuple([self._row(sequence, count) for draft in drafts for sequence, count in draft.entries])
        if not rows:
            return None
        self.counters.steps += 1
        for replica, draft in zip(self._replicas, drafts, strict=True):
            self.counters.replica_tokens[replica.index] += draft.num_tokens
            replica.seal(draft)
            self.counters.swap_out_blocks += len(draft.swap_outs)
            self.counters.swap_in_blocks += len(draft.swap_ins)
        return StepPlan(
            index=self.counters.steps,
            rows=rows,
            swap_outs=tuple([swap for draft in drafts for swap in draft.swap_outs]),
            swap_ins=tuple([swap for draft in drafts for swap in draft.swap_ins]),
            prefetches=tuple([swap for draft in drafts for swap in draft.prefetches]),
            copies=tuple([copy for draft in drafts for copy in draft.copies]),
            starts=tuple([start for draft in drafts for start in draft.starts]),
        )

    def commit(self, plan: StepPlan, result: StepResult, now_s: float) -> list[Progress]:
        """Take the results of a plan, in plan order. Sequences that reached an end token or their length are ended."""
        progress, charge = [], self._policy.charge
        for row, outcome in zip(plan.rows, result.rows, strict=True):
            seat = row.seat
            sequence = self._sequences.get(seat.seq_id)
            if sequence is None:
                self.counters.wasted_rows += 1
                continue
            if row.samples and seat.task is Task.GENERATE:
                assert outcome.token_id is not None
                sequence.num_pending -= 1
                sequence.tokens.append(outcome.token_id)
                sequence.view.num_output += 1
                self._accounts[seat.seq_id].output_tokens += 1
                self.counters.output_tokens += 1
                charge(sequence.view, 0, 1)
            if sequence.seat is seat:
                self._replicas[sequence.replica].note_computed(sequence, row.start, row.start + row.num_tokens)
            finish = finish_of(sequence, row)
            if finish:
                self.finish(sequence, now_s)
            progress.append(Progress(sequence, row, outcome, finish))
        return progress

    def check(self) -> None:
        """Prove the books: stores, slots, queues. For tests."""
        for replica in self._replicas:
            replica.check()
        known = [*self.running_ids, *(view.seq_id for view in self._waiting)]
        assert sorted(known) == sorted(self._sequences), "sequences leak, or run twice"
        for replica in self._replicas:
            parked = {s.seq_id for s in self._sequences.values() if s.num_parked and s.replica == replica.index}
            held = replica.host.store.seq_ids if replica.host is not None else set()
            assert parked <= held <= parked | {s.seq_id for s, _ in replica.arriving}, "copies leak"

    @property
    def _running(self) -> list[Sequence]:
        return [sequence for replica in self._replicas for sequence in replica.running]

    def _draft(self, replica: Replica, now_s: float) -> Draft:
        """One replica's part of the step, but for admissions."""
        draft = Draft(budget=self._token_budget)
        replica.land()
        prompts = []
        size, table_of = replica.store.block_size, replica.store.table
        for sequence in tuple(replica.running):  # decodes: every one, every step
            computed = sequence.num_computed
            total = len(sequence.tokens) + sequence.num_pending
            if computed < sequence.num_prompt or total != computed + 1:
                prompts.append(sequence)
            elif total >= sequence.max_len or sequence.state is not State.RUNNING:
                continue
            elif sequence.needs_host or total > size * len(table_of(sequence.seq_id)):
                self._extend(replica, draft, sequence, 1, now_s)
            else:
                draft.entries.append((sequence, 1))
                draft.num_tokens += 1
            draft.num_context += total
        draft.budget = self._policy.token_budget(Decodes(len(draft.entries), draft.num_context), self._token_budget)
        for sequence in prompts:  # prompts under way, oldest first
            if sequence.num_left:
                self._extend(replica, draft, sequence, self._chunk(draft, sequence), now_s)
        return draft

    def _extend(self, replica: Replica, draft: Draft, sequence: Sequence, count: int, now_s: float) -> bool:
        """Draft `count` tokens of a running sequence, preempting others of its replica for blocks if need be."""
        if count <= 0 or sequence.state is not State.RUNNING or (sequence.needs_host and sequence.num_pending):
            return False
        while not replica.store.grow(sequence.seq_id, sequence.num_computed + count):
            drafted = {each.seq_id for each, _ in draft.entries}
            others = [s for s in _movable(replica) if s is not sequence and s.seq_id not in drafted]
            if others:
                victim = self._policy.victim([s.view for s in others], now_s)
                self._preempt(self._sequences[victim.seq_id], now_s)
                draft.is_closed = True  # nobody takes the place of who was just thrown out
            elif not replica.drop_pins():
                return False  # those drafted will end some day; a sequence always fits alone
        draft.add(sequence, count)
        if sequence.num_computed < sequence.num_prompt or count > 1:
            self._policy.charge(sequence.view, count, 0)
        return True

    def _chunk(self, draft: Draft, sequence: Sequence) -> int:
        """How many tokens of a prompt go into this step."""
        if self._chunked or sequence.num_left <= draft.budget_left:
            return min(sequence.num_left, draft.budget_left)
        return 0

    def _admit(self, drafts: Seq[Draft], now_s: float) -> None:
        """Send waiting sequences to replicas, in the policy's order."""
        vacant = self._vacant(drafts)
        if not vacant:
            return
        running = [sequence.view for sequence in self._running]
        for view in self._policy.order(tuple(self._waiting), running, now_s):
            sequence = self._sequences[view.seq_id]
            if sequence.num_pending or not sequence.wants_more or sequence.awaits_parent:
                continue
            if self._client_quota and self._accounts[view.seq_id].num_running >= self._client_quota:
                continue
            draft = self._place(drafts, choices(self._replicas, vacant, sequence), sequence, now_s)
            if draft is not None:
                replica = self._replicas[sequence.replica]
                self._extend(replica, draft, sequence, self._chunk(draft, sequence), now_s)
            vacant = self._vacant(drafts)
            if not vacant:  # known before the policy is asked for one more: that may change its state
                break

    def _vacant(self, drafts: Seq[Draft]) -> list[Replica]:
        """Replicas that may take one more sequence in this step."""
        replicas = zip(self._replicas, drafts, strict=True)
        return [r for r, draft in replicas if draft.may_admit and (r.has_slot or self._displaces)]

    def _place(self, drafts: Seq[Draft], candidates: list[Replica], sequence: Sequence, now_s: float) -> Draft | None:
        """Admit a sequence to the best replica that has room for it. If none has, the policy says if others may overtake."""
        for replica in ranked(candidates, sequence, self._capacity.num_slots):
            draft = drafts[replica.index]
            arrival = replica.admit(sequence)
            if (
                isinstance(arrival, int)
                and self._displaces
                and self._make_room(replica, draft, sequence, arrival, now_s)
            ):
                arrival = replica.admit(sequence)
            if not isinstance(arrival, int):
                self._welcome(draft, sequence, arrival, now_s)
                return draft
        if not self._policy.lets_pass(sequence.view, now_s):
            for replica in candidates:
                drafts[replica.index].is_closed = True
        return None

    def _welcome(self, draft: Draft, sequence: Sequence, arrival: Arrival, now_s: float) -> None:
        """The books of an admission."""
        self._waiting.remove(sequence.view)
        if sequence.view.admitted_s is None:
            sequence.view.admitted_s = now_s
        draft.copies.extend(arrival.copies)
        account = self._accounts[sequence.seq_id]
        account.num_running += 1
        if not sequence.num_parked:
            account.cached_tokens += sequence.num_computed
            self.counters.cached_tokens += sequence.num_computed
            self.counters.sought_tokens += len(sequence.tokens)
        if sequence.request.params.has_edits:
            draft.starts.append(slot_start(sequence))
        self._replicas[sequence.replica].pin_prefix(sequence, 0, sequence.num_computed)
        self._policy.on_admit(sequence.view, sequence.num_computed, now_s)

    def _make_room(self, replica: Replica, draft: Draft, sequence: Sequence, shortage: int, now_s: float) -> bool:
        """Let the policy throw out running sequences for a waiting one. All that it takes go, or none."""
        left = _movable(replica)
        gone, num_freed = list[Sequence](), 0
        while not gone or num_freed < shortage:
            victim = self._policy.displaced(sequence.view, [s.view for s in left], now_s) if left else None
            if victim is None:
                return False
            gone.append(self._sequences[victim.seq_id])
            left.remove(gone[-1])
            num_freed += replica.store.num_exclusive(victim.seq_id)
        for victim in gone:
            count = draft.remove(victim)
            if count > 1 or victim.num_computed < victim.num_prompt:
                self._policy.charge(victim.view, -count, 0)
            self._preempt(victim, now_s)
            self.counters.displaced += 1
        return True

    def _draft_arrivals(self, drafts: Seq[Draft], now_s: float) -> None:
        """Nothing else can run: wait for blocks on their way, instead of letting them take a step's time."""
        for replica, draft in zip(self._replicas, drafts, strict=True):
            arriving = [sequence for sequence, _ in replica.arriving]
            replica.land()
            for sequence in arriving:
                self._extend(replica, draft, sequence, self._chunk(draft, sequence), now_s)

    def _row(self, sequence: Sequence, count: int) -> Row:
        row = make_row(sequence, count, self._replicas[sequence.replica].store.table(sequence.seq_id))
        start = sequence.num_computed
        if row.logprob_targets is not None:
            sequence.num_scored = start + count + 1
        sequence.num_computed = start + count
        if row.samples and row.seat.task is Task.GENERATE:
            sequence.num_pending += 1
        if count > 1 or start < sequence.num_prompt:
            self.counters.prompt_tokens += count
            self._accounts[sequence.seq_id].prompt_tokens += count
        return row

    def _remove(self, sequence: Sequence) -> Account:
        """Take a sequence out of everything; returns its client's account."""
        account = self._accounts.pop(sequence.seq_id)
        replica = self._replicas[sequence.replica]
        if sequence.state is State.WAITING:
            self._waiting.remove(sequence.view)
            replica.forget(sequence)
        else:
            replica.dismiss(sequence)
            account.num_running -= 1
        sequence.state = State.FINISHED
        del self._sequences[sequence.seq_id]
        return account

    def _preempt(self, sequence: Sequence, now_s: float) -> None:
        """Take a sequence's blocks away; ahead of others it comes back from host memory, or starts over from whatever the
        prefix cache still has."""
        replica = self._replicas[sequence.replica]
        self.counters.swapped += replica.park(sequence)
        replica.dismiss(sequence)
        sequence.state = State.WAITING
        sequence.num_computed = 0
        sequence.epoch += 1
        sequence.view.num_preemptions += 1
        self._waiting.insert(0, sequence.view)
        self.counters.preemptions += 1
        account = self._accounts[sequence.seq_id]
        account.preemptions += 1
        account.num_running -= 1
        self._policy.on_preempt(sequence.view, now_s)


def _movable(replica: Replica) -> list[Sequence]:
    """Who may lose their blocks: nobody whose blocks are not all in the pool yet, or who needs no more steps."""
    return [s for s in replica.running if s.state is State.RUNNING and s.num_left and not replica.has_landed(s)]
