"""KVStore: which block of the pool holds what. Block ids only; the arrays live in the executor.

A block is in exactly one of three states: *free*; *held* by one or more tables (its reference count); or *cached*, that
is in the prefix tree with no holder, where it waits to be matched again or evicted. A held block may be in the tree too.
Only full blocks whose tokens are known are ever put in the tree, so a shared block is never written again.
"""

import heapq
from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

from jaxserve.errors import InvariantError
from jaxserve.kv.evict import least_recently_used
from jaxserve.kv.prefix import Node, PrefixTree
from jaxserve.step import BlockCopy

Order = Callable[[Node], tuple[float, ...]]


class Mark(NamedTuple):
    """How much of a sequence is cached, and where in the prefix tree that ends. True as long as the node's version stays."""

    num_tokens: int
    node: Node
    version: int
    limit: int  # most tokens that were wanted


class _Table:
    """Blocks of one sequence, in order of position."""

    __slots__ = ("blocks", "frozen", "namespace", "num_registered", "tail")

    def __init__(self, namespace: str):
        self.namespace = namespace
        self.blocks: list[int] = []
        self.frozen: tuple[int, ...] | None = None  # `blocks`, once somebody has asked; plans share it
        self.num_registered = 0  # leading blocks that are in the prefix tree
        self.tail: Node | None = None  # the tree node of the last registered block; None: the root


class KVStore:
    """Reference-counted blocks, a table per sequence, and a prefix tree over full blocks. Each replica has its own."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True, order: Order = least_recently_used):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self._order = order
        self._tree = PrefixTree(block_size)
        self._tables: dict[str, _Table] = {}
        self._holders = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # popped from the end: low ids first
        self._num_cached = 0  # in the tree, without a holder
        self._evictable: list[tuple[tuple[float, ...], int, Node]] = []  # heap; stale entries are skipped
        self._time = 0  # counts uses; the clock of eviction orders

    @property
    def num_available(self) -> int:
        """Blocks that can be had without taking one from a sequence."""
        return len(self._free) + self._num_cached

    @property
    def num_held(self) -> int:
        """Blocks in some sequence's table."""
        return self.num_blocks - self.num_available

    @property
    def seq_ids(self) -> Set[str]:
        """Who has a table."""
        return self._tables.keys()

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def table(self, seq_id: str) -> tuple[int, ...]:
        """The blocks of a sequence."""
        table = self._tables[seq_id]
        if table.frozen is None:
            table.frozen = tuple(table.blocks)
        return table.frozen

    def num_exclusive(self, seq_id: str) -> int:
        """Blocks that nobody else holds: so many more are available when the table is closed."""
        return sum(self._holders[block] == 1 for block in self._tables[seq_id].blocks)

    def cached(self, tokens: Sequence[int], namespace: str = "", *, limit: int) -> int:
        """How many tokens `open` would find. Neither a use of them nor a change."""
        return len(self._match(tokens, namespace, limit)) * self.block_size

    def mark(self, tokens: Sequence[int], namespace: str = "", *, limit: int, last: Mark | None = None) -> Mark:
        """Like `cached`, for who asks again and again. `last`: the answer to the question before this one, when there were
        the same tokens or fewer."""
        if last is not None and last.node.version == last.version and last.limit == limit:
            return last
        start = self._tree.root(namespace) if last is None else last.node
        end = self._tree.end(start, tokens, min(limit, len(tokens))) if self.caching else start
        return Mark(end.depth * self.block_size, end, end.version, limit)

    def num_idle(self, mark: Mark) -> int:
        """Blocks of a marked prefix that nobody holds: so many fewer are available for other things when it is opened."""
        node, count = mark.node, 0
        while node.parent is not None and not self._holders[node.block]:  # who holds a block holds all before it
            node, count = node.parent, count + 1
        return count

    def open(self, seq_id: str, tokens: Sequence[int], namespace: str = "", *, limit: int) -> int:
        """Start a table with the longest cached prefix of `tokens`, at most `limit` tokens; returns its length.

        Not yet a use of that prefix, since the sequence may have to wait: see `touch`.
        """
        if seq_id in self._tables:
            raise AssertionError(f"{seq_id} already has a table")
        table = self._tables[seq_id] = _Table(namespace)
        for node in self._match(tokens, namespace, limit):
            self._hold(node.block)
            table.blocks.append(node.block)
            table.tail = node
        table.num_registered = len(table.blocks)
        table.frozen = None
        return len(table.blocks) * self.block_size

    def touch(self, seq_id: str) -> None:
        """Count a use of the cached blocks that a table holds, for eviction orders."""
        table = self._tables[seq_id]
        for node in map(self._tree.node_of, table.blocks[: table.num_registered]):
            assert node is not None
            self._touch(node)

    def grow(self, seq_id: str, num_tokens: int) -> bool:
        """Make the table long enough for `num_tokens` tokens. All or nothing: False leaves everything as it was."""
        table = self._tables[seq_id]
        missing = self.blocks_for(num_tokens) - len(table.blocks)
        if missing <= 0:
            return True
        if missing > self.num_available:
            return False
        table.frozen = None
        for _ in range(missing):
            block = self._take()
            self._holders[block] = 1
            table.blocks.append(block)
        return True

    def register(self, seq_id: str, tokens: Sequence[int], num_tokens: int | None = None) -> None:
        """Put the full blocks that hold `tokens` (all computed, or the first `num_tokens`) into the prefix tree.

        Where the tree already has the same content in another block, the sequence, and every fork that shares its own
        block, takes that one and gives the own one back. Steps under way may still read the block given back: the
        device runs them before any later write to it.
        """
        table = self._tables[seq_id]
        if not self.caching:
            return
        num_tokens = len(tokens) if num_tokens is None else num_tokens
        full = min(num_tokens // self.block_size, len(table.blocks))
        for index in range(table.num_registered, full):
            key = tuple(tokens[index * self.block_size : (index + 1) * self.block_size])
            own = table.blocks[index]
            table.tail = self._tree.insert(table.namespace, table.tail, key, own)
            self._touch(table.tail)
            if table.tail.block != own:
                self._replace(table, index, table.tail.block)
        table.num_registered = max(table.num_registered, full)

    def fork(self, parent_id: str, child_id: str, num_tokens: int) -> list[BlockCopy] | None:
        """Give the child a table that shares the parent's first `num_tokens` tokens.

        Full blocks are shared; a partly filled last one is copied. Returns the copies that the caller must execute
        before the child's next step, or None if no block is left, and then nothing has changed.
        """
        parent = self._tables[parent_id]
        num_shared, rest = divmod(num_tokens, self.block_size)
        if rest and not self.num_available:
            return None
        child = self._tables[child_id] = _Table(parent.namespace)
        for block in parent.blocks[:num_shared]:
            self._hold(block)
            child.blocks.append(block)
        child.num_registered = min(parent.num_registered, num_shared)
        child.tail = self._node_at(parent, child.num_registered)
        if not rest:
            return []
        target = self._take()
        self._holders[target] = 1
        child.blocks.append(target)
        return [BlockCopy(source=parent.blocks[num_shared], target=target)]

    def release(self, seq_id: str) -> None:
        """Close a table. Its registered blocks stay cached until they are evicted."""
        for block in reversed(self._tables.pop(seq_id).blocks):
            self._drop(block)

    def clear_cache(self) -> None:
        """Forget every cached block that no sequence holds."""
        while self._num_cached:
            self._free.append(self._evict())

    def check(self) -> None:
        """Prove the invariants; raises InvariantError with the offending ids. Slow; for tests and debugging."""
        holders = [0] * self.num_blocks
        for table in self._tables.values():
            for block in table.blocks:
                holders[block] += 1
            if len(set(table.blocks)) != len(table.blocks):
                raise InvariantError(f"a table holds a block twice: {table.blocks}")
        wrong = [b for b in range(self.num_blocks) if holders[b] != self._holders[b]]
        if wrong:
            raise InvariantError(f"reference counts disagree with tables for blocks {wrong[:8]}")
        free, in_tree = set(self._free), {node.block for node in self._tree.nodes()}
        if len(free) != len(self._free):
            raise InvariantError("a block is free twice")
        if any(self._holders[b] for b in free) or free & in_tree:
            raise InvariantError("a free block is held or cached")
        cached = {b for b in in_tree if not self._holders[b]}
        if len(cached) != self._num_cached:
            raise InvariantError(f"{len(cached)} blocks are cached, {self._num_cached} are counted")
        held = sum(1 for count in self._holders if count)
        if len(free) + len(cached) + held != self.num_blocks:
            raise InvariantError(f"free {len(free)} + cached {len(cached)} + held {held} != {self.num_blocks}")
        for node in self._tree.nodes():
            parent = node.parent
            if (
                parent is not None
                and parent.block >= 0
                and self._holders[node.block]
                and not self._holders[parent.block]
            ):
                raise InvariantError(f"block {node.block} is held but its prefix block {parent.block} is not")

    def _match(self, tokens: Sequence[int], namespace: str, limit: int) -> list[Node]:
        return self._tree.match(namespace, tokens, min(limit, len(tokens))) if self.caching else []

    def _node_at(self, table: _Table, num_blocks: int) -> Node | None:
        """The tree node of a table's `num_blocks`-th registered block, by walking up from its tail."""
        node = table.tail
        for _ in range(table.num_registered - num_blocks):
            node = node.parent if node is not None else None
        return node if num_blocks else None

    def _replace(self, table: _Table, index: int, block: int) -> None:
        """Put `block` in the place of a table's own, for all who hold that: forks must hold the tree's whole path, too."""
        own = table.blocks[index]
        for other in (table,) if self._holders[own] == 1 else self._tables.values():
            if other.blocks[index : index + 1] == [own]:
                self._hold(block)
                other.blocks[index] = block
                other.frozen = None
                self._drop(own)

    def _take(self) -> int:
        return self._free.pop() if self._free else self._evict()

    def _hold(self, block: int) -> None:
        if not self._holders[block] and self._tree.node_of(block) is not None:
            self._num_cached -= 1
        self._holders[block] += 1

    def _drop(self, block: int) -> None:
        self._holders[block] -= 1
        if self._holders[block]:
            return
        node = self._tree.node_of(block)
        if node is None:
            self._free.append(block)
            return
        self._num_cached += 1
        self._offer(node)

    def _touch(self, node: Node) -> None:
        self._time += 1
        node.last_used = self._time
        node.num_uses += 1

    def _offer(self, node: Node) -> None:
        """Make a block without holder and without children a candidate for eviction."""
        if not node.children and not self._holders[node.block]:
            heapq.heappush(self._evictable, (self._order(node), node.block, node))
            if len(self._evictable) > 2 * self.num_blocks + 64:  # mostly stale: start over from the tree
                self._evictable = [
                    (self._order(n), n.block, n)
                    for n in self._tree.nodes()
                    if not n.children and not self._holders[n.block]
                ]
                heapq.heapify(self._evictable)

    def _evict(self) -> int:
        """Remove the cached leaf that the order puts first, and return its block."""
        while self._evictable:
            key, block, node = heapq.heappop(self._evictable)
            stale = self._tree.node_of(block) is not node or node.children or self._holders[block]
            if stale or key != self._order(node):
                continue
            self._tree.remove(node)
            self._num_cached -= 1
            if node.parent is not None and node.parent.block >= 0:
                self._offer(node.parent)
            return block
        raise InvariantError("no block can be evicted, though some are counted as cached")
