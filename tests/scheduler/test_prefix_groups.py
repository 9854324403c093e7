"""Groups of prompts: nothing lost, nothing dearer than it was, and the best choice there is."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.prefix_groups import num_computed, plan_groups

SIZE = 2
# Two tokens and short prompts: deep, bushy trees, equal prompts, prompts that are beginnings of others, empty ones.
PROMPTS = st.lists(st.lists(st.integers(0, 1), max_size=13), max_size=8)


def arrays(prompts):
    return [np.array(prompt, np.int32) for prompt in prompts]


def planned(prompts, outputs=None, **options):
    return plan_groups(arrays(prompts), outputs or [1] * len(prompts), SIZE, **options)


def beginnings(prompts):
    """Every block-aligned beginning, without the last token: prompt -> set of tuples."""
    return [{tuple(p[: SIZE * k]) for k in range(1, (max(len(p) - 1, 0)) // SIZE + 1)} for p in prompts]


def cheapest(prompts):
    """The optimum by trying every set of groups; each prompt takes its deepest."""
    each = beginnings(prompts)
    shared = [b for b in set().union(*each) if sum(b in mine for mine in each) > 1]
    best = sum(map(len, prompts))
    for count in range(1, min(len(shared), len(prompts) // 2) + 1):
        for chosen in itertools.combinations(shared, count):
            depths = [max((len(b) for b in chosen if b in mine), default=0) for mine in each]
            best = min(best, sum(map(len, chosen)) + sum(map(len, prompts)) - sum(depths))
    return best


def detached(prompts):
    """The paper's rule: from the leaves up, a node leaves the group above where that alone looks better."""
    each = beginnings(prompts)
    nodes = sorted({b for mine in each for b in mine}, key=len)
    counts = {b: sum(b in mine for mine in each) for b in nodes}
    ends = [max(mine, key=len, default=()) for mine in each]
    nodes = [b for b in nodes if counts[b] > 1 and (b in ends or _branches(b, nodes, counts))]
    up = {b: max((a for a in nodes if len(a) < len(b) and b[: len(a)] == a), key=len, default=()) for b in nodes}
    leaves = dict(counts)
    for x in [*sorted(nodes, key=len, reverse=True), ()]:
        for c in [b for b in nodes if up[b] == x]:
            for g in [b for b in nodes if up[b] == c]:
                if (leaves[g] - 1) * (len(g) - len(c)) - (len(c) - len(x)) > 0:
                    up[g] = x
                    leaves[c] -= leaves[g]
    groups = [b for b in nodes if up[b] == ()]
    depths = [max((len(b) for b in groups if b in mine), default=0) for mine in each]
    used = set(depths)
    return sum(len(b) for b in groups if len(b) in used and _is_used(b, each, groups)) + sum(
        len(p) - d for p, d in zip(prompts, depths, strict=True)
    )


def _branches(b, nodes, counts):
    deeper = [n for n in nodes if len(n) == len(b) + SIZE and n[: len(b)] == b]
    return len(deeper) != 1 or counts[deeper[0]] != counts[b]


def _is_used(b, each, groups):
    return any(b in mine and b == max((g for g in groups if g in mine), key=len) for mine in each)


@given(PROMPTS)
@settings(max_examples=60)
def test_every_prompt_is_in_one_group_and_begins_with_its_prefix(prompts):
    groups = planned(prompts)
    assert sorted(member for group in groups for member in group.members) == list(range(len(prompts)))
    for group in groups:
        assert group.num_shared % SIZE == 0
        assert len({tuple(prompts[member][: group.num_shared]) for member in group.members}) == 1
        assert all(len(prompts[member]) > group.num_shared or not group.num_shared for member in group.members)
        assert (len(group.members) > 1) == (group.num_shared > 0)


@given(PROMPTS)
@settings(max_examples=60)
def test_no_choice_of_groups_computes_less(prompts):
    computed = num_computed(planned(prompts), arrays(prompts))
    whole_tree = sum(map(len, prompts)) - sum(map(len, beginnings(prompts))) * SIZE
    whole_tree += len(set().union(*beginnings(prompts))) * SIZE
    assert whole_tree <= computed == cheapest(prompts) <= detached(prompts)


def test_a_group_in_a_group_is_made_where_it_saves_more_than_its_prefix_costs_again():
    outer, inner = [1] * 8, [2] * 4
    few = [[*outer, *inner, n, 0] for n in (3, 4)] + [[*outer, n, 0] for n in (5, 6, 7)]
    assert [group.num_shared for group in planned(few)] == [8], "saves 4, costs 8 again"
    many = [[*outer, *inner, n, 0] for n in (3, 4, 5, 6)] + [[*outer, n, 0] for n in (7, 8)]
    assert sorted(group.num_shared for group in planned(many)) == [8, 12], "saves 12, costs 8 again"


def test_those_that_write_most_for_what_they_compute_go_first():
    prompts = [[1] * 4 + [9], [1] * 4 + [8], [2] * 4 + [9], [2] * 4 + [8], [3, 3, 3]]
    groups = planned(prompts, [1, 1, 30, 30, 5])
    assert [group.members for group in groups] == [(2, 3), (4,), (0, 1)]
    assert [group.ratio for group in groups] == pytest.approx([60 / 6, 5 / 3, 2 / 6])
    in_tree_order = planned(prompts, [1, 1, 30, 30, 5], by_ratio=False)
    assert [group.members for group in in_tree_order] == [(4,), (0, 1), (2, 3)]


def test_nothing_is_planned_for_nothing():
    assert planned([]) == []
