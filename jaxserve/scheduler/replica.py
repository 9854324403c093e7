"""One replica of the weights as the scheduler sees it: its KV blocks, its slots, and who runs on it.

A sequence stays on the replica that admitted it until it ends or is preempted; after that it may go to another.
"""

from jaxserve.kv.store import KVStore
from jaxserve.request import Request, Task
from jaxserve.scheduler.sequence import Sequence, State
from jaxserve.step import BlockCopy


class Replica:
    """The books of one replica. Never decides who comes or goes."""

    def __init__(self, index: int, store: KVStore, num_slots: int):
        self.index = index
        self.store = store
        self.running: list[Sequence] = []  # in order of admission
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._watermark = max(1, store.num_blocks // 100)

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
        if self._may_fork(sequence):
            return _num_shared(sequence)
        return self.store.cached(sequence.tokens, sequence.request.namespace, limit=_cache_limit(sequence))

    def admit(self, sequence: Sequence) -> list[BlockCopy] | None:
        """Give a waiting sequence a slot and a table: its parent's prompt, a cached prefix, or an empty one.

        Returns the copies to be made before its first step, or None where there is no room yet; then nothing has changed.
        """
        store, copies = self.store, []
        if self._may_fork(sequence) and sequence.parent is not None:
            cached = _num_shared(sequence)
            forked = store.fork(sequence.parent.seq_id, sequence.seq_id, cached)
            if forked is None:
                return None
            copies = [copy._replace(replica=self.index) for copy in forked]
        else:
            limit = _cache_limit(sequence)
            cached = store.open(sequence.seq_id, sequence.tokens, sequence.request.namespace, limit=limit)
        if self.running and self._missing_blocks(sequence) + self._promised() > store.num_available:
            store.release(sequence.seq_id)
            return None
        store.touch(sequence.seq_id)
        self.running.append(sequence)
        sequence.state, sequence.replica, sequence.slot = State.RUNNING, self.index, self._free_slots.pop()
        sequence.num_computed = cached
        sequence.num_cached = max(sequence.num_cached, min(cached, sequence.num_prompt))
        return copies

    def dismiss(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks and slot away."""
        self.running.remove(sequence)
        self.store.release(sequence.seq_id)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    def check(self) -> None:
        """Prove the books: store, slots, tables. For tests."""
        self.store.check()
        slots = [s.slot for s in self.running]
        assert len(set(slots)) == len(slots) and not set(slots) & set(self._free_slots), "slots are shared"
        assert len(slots) + len(self._free_slots) == self._num_slots, "slots leak"
        assert all(s.replica == self.index and s.state is State.RUNNING for s in self.running), "not running here"
        assert self.store.seq_ids == {s.seq_id for s in self.running}, "tables leak"

    def _may_fork(self, sequence: Sequence) -> bool:
        parent = sequence.parent
        if parent is None or parent.state is not State.RUNNING or parent.replica != self.index:
            return False
        return not sequence.num_output

    def _missing_blocks(self, sequence: Sequence) -> int:
        return self.store.blocks_for(sequence.num_total + 1) - len(self.store.table(sequence.seq_id))

    def _promised(self) -> int:
        """Blocks that prompts under way will still need, and a margin against preempting at once."""
        return self._watermark + sum(max(self._missing_blocks(s), 0) for s in self.running if s.is_prefill)


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
