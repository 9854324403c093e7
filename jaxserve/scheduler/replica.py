"""One replica of the weights as the scheduler sees it: its KV blocks, its slots, and who runs on it.

A sequence stays on the replica that admitted it until it ends or is preempted; after that it may go to another, unless its
keys and values wait for it in this one's host memory.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxserve.kv.host import HostTier
from jaxserve.kv.store import KVStore, Mark
from jaxserve.request import Request, Task
from jaxserve.scheduler.draft import Draft
from jaxserve.scheduler.sequence import Sequence, State
from jaxserve.step import BlockCopy, BlockSwap, Capacity

PIN = "pin:"  # what tables that keep prefixes are called; ids of sequences end in a number

# Whether to move so many blocks to host memory and back is quicker than to compute so many tokens again.
SwapRule = Callable[[int, int], bool]


class Arrival(NamedTuple):
    """What has to happen on the device before a sequence that was admitted can run."""

    copies: list[BlockCopy]


class Replica:
    """The books of one replica. Never decides who comes or goes."""

    def __init__(self, index: int, store: KVStore, capacity: Capacity, swap_rule: SwapRule):
        self.index = index
        self.store = store
        size, num_copies = store.block_size, capacity.num_host_blocks
        self.host = HostTier(num_copies, size, caching=store.caching) if num_copies else None
        self.running: list[Sequence] = []  # in order of admission
        self.arriving: list[tuple[Sequence, list[BlockSwap]]] = []  # of those: whose blocks are on their way
        self._swap_outs: list[BlockSwap] = []  # for the next plan
        self._swap_ins: list[BlockSwap] = []
        self._num_slots = capacity.num_slots
        self._free_slots = list(range(capacity.num_slots - 1, -1, -1))
        self._watermark = max(1, store.num_blocks // 100)
        self._swap_rule = swap_rule
        self._landed: list[Sequence] = []  # whose copies in host memory the plan under way still reads

    @property
    def has_slot(self) -> bool:
        """Whether one more sequence may run here, blocks permitting."""
        return bool(self._free_slots)

    @property
    def num_ahead(self) -> int:
        """Prompt tokens that are still to be fed here before those of a newcomer."""
        return sum(s.num_left for s in self.running if s.is_prefill)

    def is_feeding(self, request: Request) -> bool:
        """Whether the prompt of a request is being computed here, and so will be cached soon."""
        return any(s.request is request and (s.is_prefill or not s.view.num_output) for s in self.running)

    def cached(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that would not have to be fed here."""
        if sequence.num_parked:
            return sequence.num_parked if sequence.replica == self.index else 0
        if sequence.parent is not None and self._may_fork(sequence):
            return _num_shared(sequence)
        cached = self._mark(sequence, self.store, self.index).num_tokens
        return max(cached, self._num_copied(sequence, cached))

    def admit(self, sequence: Sequence) -> Arrival | int:
        """Give a waiting sequence a slot and a table: its parent's prompt, a cached prefix, its copies in host memory.

        Returns how many blocks there are too few (0: a slot is missing); then nothing has changed.
        """
        store, seq_id = self.store, sequence.seq_id
        copies, num_held = [], 0
        if self._may_fork(sequence) and sequence.parent is not None:
            cached = _num_shared(sequence)
            forked = store.fork(sequence.parent.seq_id, seq_id, cached)
            if forked is None:
                return 1
            copies = [copy._replace(replica=self.index) for copy in forked]
        else:
            shortage = self._shortage(sequence) if self.running else 0
            if not self._free_slots or shortage > 0:  # nothing to undo: policies may ask for many in one step
                return max(shortage, 0)
            limit = _cache_limit(sequence)
            cached = store.open(seq_id, sequence.tokens, sequence.request.namespace, limit=limit)
            num_held = self._hold_copies(sequence, cached, limit)
        shortage = self._missing_blocks(sequence) + self._promised() - store.num_available
        is_full = not self._free_slots or (self.running and shortage > 0)
        if is_full or (num_held and not self._take_all(seq_id, num_held)):
            store.release(seq_id)
            self._let_go_of_copies(sequence)
            return max(shortage, 0)
        store.touch(seq_id)
        self.running.append(sequence)
        sequence.state = State.RUNNING
        if num_held:
            self._await_copies(sequence, cached // store.block_size)
        else:
            self.forget(sequence)  # it was swapped out, and shares its parent's prompt now
        sequence.num_computed = max(cached, num_held)
        sequence.num_cached = max(sequence.num_cached, min(sequence.num_computed, sequence.num_prompt))
        sequence.sit(self.index, self._free_slots.pop())
        return Arrival(copies)

    def dismiss(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks and slot away."""
        self.running.remove(sequence)
        self.store.release(sequence.seq_id)
        self._free_slots.append(sequence.slot)
        if sequence.state is State.ARRIVING:
            self.arriving = [(each, swaps) for each, swaps in self.arriving if each is not sequence]
            self.forget(sequence)
        sequence.slot, sequence.seat = -1, None
        sequence.marks.clear()  # more of it may come from the cache now: what was scored need not be computed again

    def park(self, sequence: Sequence) -> bool:
        """Copy a running sequence's blocks to host memory, to be taken away next. False: they have to be computed again."""
        num_computed = sequence.num_computed
        if self.host is None or not 0 < num_computed <= len(sequence.tokens) or self.host.holds(sequence.seq_id):
            return False
        if not self._swap_rule(self.store.blocks_for(num_computed), num_computed):
            return False
        if not self._copy_out(sequence, num_computed):
            return False
        sequence.num_parked = num_computed
        return True

    def keep_copy(self, sequence: Sequence) -> None:
        """Copy whole blocks of a sequence that has ended to host memory, if there is room, for requests that begin like
        it."""
        if self.host is None or self.host.holds(sequence.seq_id):
            return
        num_known = min(sequence.num_computed, len(sequence.tokens))
        if self._copy_out(sequence, num_known // self.store.block_size * self.store.block_size):
            self.host.store.release(sequence.seq_id)

    def forget(self, sequence: Sequence) -> None:
        """Drop a sequence's copies: it has ended, or does not need them."""
        sequence.num_parked = 0
        self._let_go_of_copies(sequence)

    def land(self) -> None:
        """Those whose blocks were on their way may run from now on."""
        for sequence, swaps in self.arriving:
            self._swap_ins += swaps
            sequence.state = State.RUNNING
            sequence.num_parked = 0
            self._landed.append(sequence)
        self.arriving = []

    def has_landed(self, sequence: Sequence) -> bool:
        """Whether a sequence's blocks come back in the very step that is being planned."""
        return sequence in self._landed

    def seal(self, draft: Draft) -> None:
        """The plan is made: hand it the blocks that move, and let go of the copies that it reads."""
        draft.swap_outs, self._swap_outs = self._swap_outs, []
        draft.swap_ins, self._swap_ins = self._swap_ins, []
        draft.prefetches = [swap for _, swaps in self.arriving for swap in swaps]
        for sequence in self._landed:
            self._let_go_of_copies(sequence)
        self._landed = []

    def note_computed(self, sequence: Sequence, start: int, end: int) -> None:
        """The tokens from `start` to `end` are there: put blocks that are full now into the prefix tree, and pin."""
        size = self.store.block_size
        if end // size > start // size:
            self.store.register(sequence.seq_id, sequence.tokens, end)
        self.pin_prefix(sequence, start, end)

    def pin_prefix(self, sequence: Sequence, start: int, end: int) -> None:
        """Pin what a request wants pinned, once its sequence has come from `start` to `end`."""
        request = sequence.request
        if request.pin and start < request.pin_tokens <= end:
            self.pin(request.pin, sequence, request.pin_tokens)

    def pin(self, name: str, sequence: Sequence, num_tokens: int) -> None:
        """Keep the first tokens of a sequence cached until `unpin`; nothing happens if they are not all cached."""
        store, tokens, namespace = self.store, sequence.tokens, sequence.request.namespace
        num_whole = num_tokens // store.block_size * store.block_size
        if PIN + name not in store.seq_ids and store.cached(tokens, namespace, limit=num_tokens) == num_whole:
            store.open(PIN + name, tokens, namespace, limit=num_tokens)

    def unpin(self, name: str) -> None:
        """Let what was pinned under this name be evicted."""
        if PIN + name in self.store.seq_ids:
            self.store.release(PIN + name)

    def drop_pins(self) -> bool:
        """Give all pins up, for a sequence that would not fit otherwise. Returns whether there were any."""
        pins = [table for table in self.store.seq_ids if table.startswith(PIN)]
        for pin in pins:
            self.store.release(pin)
        return bool(pins)

    def clear(self) -> None:
        """The pool is lost: forget what is cached, pinned, or on its way."""
        self._swap_outs, self._swap_ins, self._landed = [], [], []
        self.drop_pins()
        self.store.clear_cache()
        if self.host is not None:
            self.host.store.clear_cache()

    def check(self) -> None:
        """Prove the books: store, slots, tables. For tests."""
        self.store.check()
        slots = [s.slot for s in self.running]
        assert len(set(slots)) == len(slots) and not set(slots) & set(self._free_slots), "slots are shared"
        assert len(slots) + len(self._free_slots) == self._num_slots, "slots leak"
        states = (State.RUNNING, State.ARRIVING)
        assert all(s.replica == self.index and s.state in states for s in self.running), "not running here"
        tables = {table for table in self.store.seq_ids if not table.startswith(PIN)}
        assert tables == {s.seq_id for s in self.running}, "tables leak"
        arriving = [sequence for sequence, _ in self.arriving]
        assert arriving == [s for s in self.running if s.state is State.ARRIVING], "arrivals are lost"
        if self.host is not None:
            self.host.store.check()

    def _copy_out(self, sequence: Sequence, num_tokens: int) -> bool:
        assert self.host is not None
        table = self.store.table(sequence.seq_id)
        tokens = sequence.tokens[:num_tokens]
        swaps = self.host.park(sequence.seq_id, tokens, sequence.request.namespace, table, self.index)
        if swaps is None:
            return False
        self._swap_outs += swaps
        return True

    def _take_all(self, seq_id: str, num_tokens: int) -> bool:
        """Blocks for a sequence that comes back from host memory; alone it always fits."""
        if self.store.grow(seq_id, num_tokens):
            return True
        return not self.running and self.drop_pins() and self.store.grow(seq_id, num_tokens)

    def _hold_copies(self, sequence: Sequence, cached: int, limit: int) -> int:
        """Tokens that host memory has for a sequence and that the pool has not; 0: none, or computing them is quicker."""
        if sequence.num_parked:
            return sequence.num_parked
        if self.host is None or not self._num_copied(sequence, cached):
            return 0
        return self.host.hold(sequence.seq_id, sequence.tokens, sequence.request.namespace, limit)

    def _num_copied(self, sequence: Sequence, cached: int) -> int:
        """Tokens of a waiting sequence that others have left in host memory; 0: no more than `cached`, or too few."""
        if self.host is None:
            return 0
        found = self._mark(sequence, self.host.store, -1 - self.index).num_tokens
        is_worth_it = found > cached and self._swap_rule((found - cached) // self.store.block_size, found - cached)
        return found if is_worth_it else 0

    def _await_copies(self, sequence: Sequence, first: int) -> None:
        """The blocks from the `first` on come from host memory."""
        assert self.host is not None
        copies = self.host.store.table(sequence.seq_id)[first:]
        table = self.store.table(sequence.seq_id)[first:]
        swaps = [BlockSwap(device, host, self.index) for device, host in zip(table, copies, strict=False)]
        sequence.state = State.ARRIVING
        self.arriving.append((sequence, swaps))

    def _let_go_of_copies(self, sequence: Sequence) -> None:
        if not sequence.num_parked and self.host is not None and self.host.holds(sequence.seq_id):
            self.host.store.release(sequence.seq_id)

    def _may_fork(self, sequence: Sequence) -> bool:
        parent = sequence.parent
        if parent is None or parent.state is not State.RUNNING or parent.replica != self.index:
            return False
        return not sequence.num_output

    def _mark(self, sequence: Sequence, store: KVStore, key: int) -> Mark:
        """What a store has cached of a waiting sequence. Asked for very often, so answers are kept."""
        last = sequence.marks.get(key)
        if last is None or last.version != last.node.version or len(sequence.tokens) > sequence.num_prompt:
            limit = _cache_limit(sequence)
            last = store.mark(sequence.tokens, sequence.request.namespace, limit=limit, last=last)
            sequence.marks[key] = last
        return last

    def _shortage(self, sequence: Sequence) -> int:
        """Blocks that a waiting sequence would lack if it took what is cached of it; negative: so many would be left."""
        mark = self._mark(sequence, self.store, self.index)
        new = self.store.blocks_for(sequence.num_total + 1) - mark.node.depth
        return new + self.store.num_idle(mark) + self._promised() - self.store.num_available

    def _missing_blocks(self, sequence: Sequence) -> int:
        return self.store.blocks_for(sequence.num_total + 1) - len(self.store.table(sequence.seq_id))

    def _promised(self) -> int:
        """Blocks that prompts under way will still need, and a margin against preempting at once."""
        promised = self._watermark
        for s in self.running:  # `is_prefill` in full: this looks at everybody
            if s.num_computed < s.num_prompt or (s.num_computed + 1 < s.num_total and s.num_left > 1):
                promised += max(self._missing_blocks(s), 0)
        return promised


def _num_shared(sequence: Sequence) -> int:
    """Tokens that a fork shares: the last prompt token is fed again, its logits give the first answer token."""
    return sequence.num_prompt - 1


def _cache_limit(sequence: Sequence) -> int:
    """How many tokens may come from the cache: what is sampled from, or scored, has to be computed."""
    request = sequence.request
    limit = len(sequence.tokens) - 1 if request.task is Task.GENERATE else sequence.num_prompt - 1
    if request.logprobs_from is not None and sequence.num_scored < sequence.num_prompt:
        limit = min(limit, request.logprobs_from - 1)
    return max(limit, 0)
