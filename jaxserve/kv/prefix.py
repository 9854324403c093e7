"""A radix tree over token ids with one block per edge: which beginnings of prompts are in the pool.

Pure bookkeeping. It knows block ids and nothing of devices, reference counts or eviction order; the store decides what
to insert and what to drop. An edge is labelled with the `block_size` token ids of its block, so equal keys mean equal
content: there is no hash to collide.
"""

from collections.abc import Iterator, Sequence


class Node:
    """One cached block. `children` is keyed by the token ids of the child's block.

    `version` changes when a child is added or the node is removed: until then whoever ended here still does.
    """

    __slots__ = ("block", "children", "depth", "key", "last_used", "num_uses", "parent", "version")

    def __init__(self, key: tuple[int, ...], block: int, parent: "Node | None"):
        self.key = key
        self.block = block
        self.parent = parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.last_used: int = 0
        self.num_uses: int = 0
        self.version: int = 0


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

    def root(self, namespace: str) -> Node:
        """Where every prefix of a namespace begins. It is never removed."""
        return self._roots.get(namespace) or self._roots.setdefault(namespace, Node((), -1, None))

    def end(self, start: Node, tokens: Sequence[int], limit: int) -> Node:
        """The last node that `match` would find, or the root: its depth is the number of blocks. Does not modify.

        `start`: the root, or any earlier answer for the same tokens or a beginning of them. From there it is a few steps: a
        node that is still here has all its parents, because only leaves are removed.
        """
        node, size = start, self._block_size
        while node.parent is not None and (node.depth * size > limit or self._by_block.get(node.block) is not node):
            node = node.parent
        while node.children and (node.depth + 1) * size <= limit:
            below = node.children.get(tuple(tokens[node.depth * size : (node.depth + 1) * size]))
            if below is None:
                break
            node = below
        return node

    def insert(self, namespace: str, parent: Node | None, tokens: tuple[int, ...], block: int) -> Node:
        """Add one block below `parent` (None: at the root), or return the node that already holds these tokens."""
        above = parent or self.root(namespace)
        node = above.children.get(tokens)
        if node is None:
            above.version += 1
            node = above.children[tokens] = Node(tokens, block, above)
            self._by_block[block] = node
        return node

    def remove(self, node: Node) -> None:
        """Drop a leaf."""
        if node.children or node.parent is None:
            raise AssertionError("only a leaf can be removed from the prefix tree")
        node.version += 1
        del node.parent.children[node.key]
        del self._by_block[node.block]

    def nodes(self) -> Iterator[Node]:
        """All cached blocks."""
        yield from self._by_block.values()
