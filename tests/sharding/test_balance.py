"""Laws of expert load balancing, on loads as skewed as real ones (Zipf)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.sharding import balance


def zipf(num_layers: int, num_experts: int, power: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    load_x = 1000 / np.arange(1, num_experts + 1) ** power
    return np.stack([rng.permutation(load_x) for _ in range(num_layers)])


def balancedness(plan: balance.Plan, load_lx: np.ndarray, num_devices: int) -> float:
    """Mean over largest load of a device, 1 when all are equal; the average of layers."""
    share_ld = plan.shares(load_lx, num_devices)
    return float((share_ld.mean(axis=1) / share_ld.max(axis=1)).mean())


@given(
    num_devices=st.sampled_from([1, 2, 4, 8]),
    per_device=st.integers(1, 6),
    spare=st.integers(0, 20),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["zipf", "zeros", "one", "equal"]),
)
def test_laws_of_a_plan(num_devices, per_device, spare, seed, kind):
    num_slots = num_devices * per_device
    num_experts = max(1, num_slots - spare)
    load_lx = zipf(2, num_experts, 1.0, seed)
    if kind != "zipf":
        load_lx = np.full_like(load_lx, kind == "equal")
        load_lx[:, 0] += kind == "one"
    plan = balance.plan(load_lx, num_slots, num_devices)
    slots_lxc, copies_lx = plan.slots_lxc, plan.copies_lx
    assert plan.expert_ls.shape == (2, num_slots)
    assert (copies_lx >= 1).all()
    assert (copies_lx.sum(axis=1) == num_slots).all()
    for layer in range(2):
        used = [slots_lxc[layer, x, : copies_lx[layer, x]] for x in range(num_experts)]
        assert sorted(np.concatenate(used).tolist()) == list(range(num_slots))  # every slot is somebody's, once
        for expert, slots in enumerate(used):
            assert (plan.expert_ls[layer, slots] == expert).all()  # there and back
            assert (plan.expert_ls[layer, slots_lxc[layer, expert]] == expert).all()  # unused entries too
    np.testing.assert_allclose(plan.shares(load_lx, num_devices).sum(axis=1), load_lx.sum(axis=1))
    again = balance.plan(load_lx, num_slots, num_devices)
    np.testing.assert_array_equal(plan.expert_ls, again.expert_ls)
    same = balance.from_slots(plan.expert_ls, num_experts)
    np.testing.assert_array_equal(same.slots_lxc, slots_lxc)


@pytest.mark.parametrize(
    ("num_devices", "spare", "power", "plain", "least"),
    [(32, 0, 1.0, 0.18, 0.16), (32, 32, 1.0, 0.18, 0.98), (8, 8, 1.0, 0.55, 0.99), (32, 32, 0.5, 0.55, 0.98)],
)
def test_a_plan_is_as_balanced_as_published(num_devices, spare, power, plain, least):
    """128 experts. Without spare slots the most loaded expert alone is above average, and nothing can help."""
    load_lx = zipf(8, 128, power, seed=1)
    before = balancedness(balance.in_turn(8, 128, 128), load_lx, num_devices)
    after = balancedness(balance.plan(load_lx, 128 + spare, num_devices), load_lx, num_devices)
    assert before < plain
    assert after >= max(before, least)


def test_copies_go_to_the_heaviest():
    np.testing.assert_array_equal(balance.replicate(np.array([1.0, 9.0, 4.0]), 6), [1, 3, 2])
    np.testing.assert_array_equal(balance.replicate(np.zeros(3), 7), [3, 2, 2])  # evenly, if there is nothing to go by


def test_bins_are_filled_evenly():
    np.testing.assert_array_equal(balance.pack(np.array([5.0, 1.0, 4.0, 1.0]), 2), [0, 1, 1, 0])
    assert np.bincount(balance.pack(np.array([9.0, 0, 0, 0]), 2)).tolist() == [2, 2]


def test_a_group_of_experts_stays_on_one_node():
    load_lx = zipf(4, 32, 1.0, seed=3)
    plan = balance.plan(load_lx, 48, 8, num_nodes=4, num_groups=8)
    node_of_slot = np.repeat(np.arange(4), 12)
    for layer in range(4):
        for group in range(8):
            slots = np.flatnonzero(plan.expert_ls[layer] // 4 == group)
            assert len(set(node_of_slot[slots])) == 1
    free = balance.plan(load_lx, 48, 8)
    assert balancedness(free, load_lx, 8) >= balancedness(plan, load_lx, 8)
    # Groups that nodes cannot share evenly are no groups.
    np.testing.assert_array_equal(balance.plan(load_lx, 48, 8, num_nodes=4, num_groups=2).expert_ls, free.expert_ls)


def test_weights_move_only_where_they_must():
    load_lx = zipf(3, 8, 1.0, seed=5)
    old, new = balance.in_turn(3, 8, 12), balance.plan(load_lx, 12, 4)
    source_ls = balance.sources(old, new, 4)
    np.testing.assert_array_equal(np.take_along_axis(old.expert_ls, source_ls, axis=1), new.expert_ls)
    np.testing.assert_array_equal(balance.sources(new, new, 4), np.tile(np.arange(12), (3, 1)))
    stays = source_ls == np.arange(12)
    np.testing.assert_array_equal(stays, old.expert_ls == new.expert_ls)


@pytest.mark.parametrize(
    ("num_slots", "num_devices", "options", "message"),
    [
        (10, 4, {}, "8 experts cannot be held in 10 slots of 4 devices. Use 8 slots, or more by multiples of 4"),
        (4, 4, {}, "8 experts cannot be held in 4 slots"),
        (8, 4, {"num_nodes": 3}, "4 devices are not the same number on each of 3 nodes"),
        (8, 4, {"num_groups": 3}, "8 experts not in each of 3 groups"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(num_slots, num_devices, options, message):
    with pytest.raises(ConfigError, match=message):
        balance.plan(np.ones((1, 8)), num_slots, num_devices, **options)
