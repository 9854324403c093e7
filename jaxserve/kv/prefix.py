"""A radix tree over token ids with one block per edge: which beginnings of prompts are in the pool.

Pure bookkeeping. It knows block ids and nothing of devices, reference counts or eviction order; the store decides what
to insert and what to drop. An edge is labelled with the `block_size` token ids of its block, so equal keys mean equal
content: there is no hash to collide.
"""

from collections.abc import Iterator, Sequence


class Node:
    """One cached block. `children` is keyed by the token ids of the child's block."""

    __slots__ = ("block", "children", "depth", "key", "last_used", "num_uses", "parent")

    def __init__(self, key: tuple[int, ...], block: int, parent: "Node | None"):
        self.key = key
        self.block = block
        self.parent = parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.last_used: int = 0
        self.num_uses: int = 0


class PrefixTree:
    """Cached blocks by the tokens they hold. One root per namespace, so that tenants or adapters never share."""

    def __init__(self, block_size: int):
        self._block_size = block_size
        self._roots: dict[str, Node] = {}
        self._by_block: dict[int, Node] = {}

    def __len__(self) -> int:
        return len(self._by_block)

    def node_of(self, block: int) -> Node | None:
        """The node that caches a block, if one does."""
        return self._by_block.get(block)

    def match(self, namespace: str, tokens: Sequence[int], limit: int) -> list[Node]:
        """Nodes of the longest cached prefix of `tokens`, at most `limit` tokens long. Does not modify."""
        node, found = self._roots.get(namespace), []
        for start in range(0, limit - self._block_size + 1, self._block_size):
            node = node.children.get(tuple(tokens[start : start + self._block_size])) if node else None
            if node is None:
                break
            found.append(node)
        return found

    def insert(self, namespace: str, parent: Node | None, tokens: tuple[int, ...], block: int) -> Node:
        """Add one block below `parent` (None: at the root), or return the node that already holds these tokens."""
        above = parent or self._roots.setdefault(namespace, Node((), -1, None))
        node = above.children.get(tokens)
        if node is None:
            node = above.children[tokens] = Node(tokens, block, above)
            self._by_block[block] = node
        return node

    def remove(self, node: Node) -> None:
        """Drop a leaf."""
        if node.children or node.parent is None:
            raise AssertionError("only a leaf can be removed from the prefix tree")
        del node.parent.children[node.key]
        del self._by_block[node.block]

    def nodes(self) -> Iterator[Node]:
        """All cached blocks."""
        yield from self._by_block.values()
