"""The tier in host memory: copies of blocks that were, or may be, taken out of the pool. Block ids only, as in the store.

It is an ordinary `KVStore`. The table of a sequence that was swapped out holds its copies, a partly filled last block
included. When the sequence is back they stay cached by their content until room is wanted: so the next time only what is
new has to be copied, and the next turn of a conversation finds the turns before (FastSwitch, arXiv 2411.18424, section 3:
reuse across turns and preemptions). Copies that live sequences wait for are never dropped for idle ones.
"""

from collections.abc import Sequence

from jaxserve.kv.store import KVStore
from jaxserve.step import BlockSwap


class HostTier:
    """Which block of host memory holds a copy of what."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True):
        """`caching`: whether copies are found by their content, too, and not only by whom they wait for."""
        self.store = KVStore(num_blocks, block_size, caching=caching)

    def park(
        self, seq_id: str, tokens: Sequence[int], namespace: str, table: Sequence[int], replica: int
    ) -> list[BlockSwap] | None:
        """Open a table of copies for `tokens`, which lie in the device blocks of `table`.

        Returns what has to be copied, which is what is not here yet; None: there is no room, and nothing has changed.
        """
        num_found = self.store.open(seq_id, tokens, namespace, limit=len(tokens))
        if not self.store.grow(seq_id, len(tokens)):
            self.store.release(seq_id)
            return None
        first = num_found // self.store.block_size
        copies = self.store.table(seq_id)
        pairs = zip(table[first:], copies[first:], strict=False)  # the device table may have room for one token more
        swaps = [BlockSwap(device, host, replica) for device, host in pairs]
        self.store.register(seq_id, tokens)
        return swaps

    def hold(self, seq_id: str, tokens: Sequence[int], namespace: str, limit: int) -> int:
        """Open a table of the copies of a prefix, at most `limit` tokens of it; returns how many."""
        found = self.store.open(seq_id, tokens, namespace, limit=limit)
        self.store.touch(seq_id)
        return found

    def holds(self, seq_id: str) -> bool:
        """Whether a sequence has a table here."""
        return seq_id in self.store.seq_ids
