"""A job's prompts in groups that begin alike, so that each beginning is computed once. Planned before anything runs.

A prefix tree over all prompts, whose edges are whole KV blocks, says who shares what. Each group shares one prefix: the
path from the root to some node. So a group within a group takes its members out of the outer one, saves their deeper
prefix, and computes the outer prefix once more. BatchLLM (2024, arXiv 2412.03594) detaches a node from the one above it
where that is better for these two alone, from the leaves up. Here the best choice of nodes in the whole tree is found: what
a subtree costs depends on the rest only through the nearest group above it, and there are few, as the tree is low.

The tree is that of the sorted prompts and of how much neighbours share, so nothing is hashed, and nothing can collide.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Tokens = np.ndarray  # int32[tokens of a prompt]


class Group(NamedTuple):
    """Prompts that begin with the same `num_shared` tokens."""

    members: tuple[int, ...]  # places in the job; neighbours in the tree are neighbours here
    num_shared: int  # tokens, a multiple of the block size; 0: a prompt by itself
    ratio: float  # tokens to be written / prompt tokens to be computed


def plan_groups(
    prompts: Sequence[Tokens], output_tokens: Sequence[int], block_size: int, *, by_ratio: bool = True
) -> list[Group]:
    """Groups for which the fewest prompt tokens have to be computed, in the order in which to start them.

    `output_tokens`: how long each answer is expected to be. `by_ratio`: those that write most for what they compute
    first, so that later prompts fill the steps in which they write (the paper's decode ratio); else, and among equals, in
    the order of the tree, where groups that share something are neighbours.

    The last token of a prompt is never shared: the first of the answer comes from it.
    """
    groups = []
    for members, depth in _cheapest(_tree(prompts, block_size)):
        for some in [members] if depth else [[member] for member in members]:
            shared = depth * block_size
            computed = sum(len(prompts[member]) for member in some) - shared * (len(some) - 1)
            written = sum(output_tokens[member] for member in some)
            groups.append(Group(tuple(some), shared, written / max(computed, 1)))
    if by_ratio:
        groups.sort(key=lambda group: -group.ratio)
    return groups


def num_computed(groups: Sequence[Group], prompts: Sequence[Tokens]) -> int:
    """Prompt tokens to be computed, if each prefix stays cached as long as its group has members."""
    shared = sum(group.num_shared * (len(group.members) - 1) for group in groups)
    return sum(map(len, prompts)) - shared


class _Node:
    """A beginning that at least two prompts share: `depth` blocks. `members` are the prompts that share no more."""

    __slots__ = ("children", "costs", "depth", "members", "num_worth")

    def __init__(self, depth: int):
        self.depth = depth
        self.children: list[_Node] = []
        self.members: list[int] = []
        self.costs: list[int] = []  # blocks of its subtree if the nearest group above is: the root, ..., the parent
        self.num_worth = 0  # for how many of those, from the root on, it is worth being a group itself


def _tree(prompts: Sequence[Tokens], block_size: int) -> _Node:
    """The root of the tree. Nodes with one child and no member do not exist."""
    lengths = [max(len(prompt) - 1, 0) // block_size for prompt in prompts]
    keys = [
        prompt[: length * block_size].astype(np.int32, copy=False).tobytes()
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    common = [_common(keys[a], keys[b]) // (4 * block_size) for a, b in itertools.pairwise(order)]
    stack = [_Node(0)]
    for place, member in enumerate(order):
        _close(stack, common[place - 1] if place else 0)
        shared = common[place] if place < len(common) else 0
        if shared > stack[-1].depth:
            stack.append(_Node(shared))
        stack[-1].members.append(member)
    _close(stack, 0)
    return stack[0]


def _close(stack: list[_Node], depth: int) -> None:
    """The next prompt shares `depth` blocks with the last: end what is deeper."""
    while stack[-1].depth > depth:
        node = stack.pop()
        if stack[-1].depth < depth:
            stack.append(_Node(depth))
        stack[-1].children.append(node)


def _common(a: bytes, b: bytes) -> int:
    """Bytes that two keys begin with alike, which may end inside of a token."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    ours, theirs = np.frombuffer(a, np.uint8, length), np.frombuffer(b, np.uint8, length)
    return int(np.argmax(ours != theirs))


def _cheapest(root: _Node) -> list[tuple[list[int], int]]:
    """Members of each group and its depth, such that the fewest blocks are computed. Depth 0: they share nothing."""
    nodes: list[tuple[_Node, tuple[int, ...]]] = [(root, ())]  # with the depths of those above
    for node, above in nodes:  # which grows meanwhile
        below = (*above, node.depth)
        nodes += [(child, below) for child in node.children]
    for node, above in reversed(nodes[1:]):
        # A group costs its depth, and saves it for each member.
        as_group = node.depth * (1 - len(node.members)) + sum(child.costs[-1] for child in node.children)
        for level, depth in enumerate(above):
            without = sum(child.costs[level] for child in node.children) - depth * len(node.members)
            node.num_worth += as_group < without
            node.costs.append(min(as_group, without))
    groups: list[tuple[list[int], int]] = [(root.members, 0)]
    stack = [(child, 0, groups[0][0]) for child in reversed(root.children)]  # the nearest group's level, its members
    while stack:
        node, level, members = stack.pop()
        if level < node.num_worth:
            level, members = len(node.costs), list[int]()
            groups.append((members, node.depth))
        members += node.members
        stack += [(child, level, members) for child in reversed(node.children)]
    return groups
