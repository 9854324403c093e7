"""The planner of prefill waves: its two cuttings against all cuttings, what every plan keeps to, how near the best it is."""

import dataclasses
import itertools
import random

import pytest

from jaxserve.errors import CapacityError
from jaxserve.scheduler.flexsp import CostModel, Wave, bucket, form_wave, lower_bound_s, partitions, plan, split
from jaxserve.scheduler.flexsp_exact import optimum_s

# About Llama-3-8B on chips with 200 TFLOP/s and links of 100 GB/s: 16 GFLOP and 1 MB sent for each token, 262 kFLOP for each
# pair of tokens, 131 kB of keys and values.
COST = CostModel(
    pair_s=1.3e-9,
    token_s=8e-5,
    start_s=2e-3,
    sent_bytes=1e6,
    bytes_per_s={2: 1e11, 4: 8e10, 8: 5e10, 16: 2.5e10},
    link_start_s=1e-3,
    token_bytes=131072,
    free_bytes=4e9,
)


def random_lengths(seed: int, count: int, longest: int = 100_000) -> list[int]:
    rng = random.Random(seed)
    return [min(int(rng.lognormvariate(7, 1.5)) + 1, longest) for _ in range(count)]


def cuts(size: int, count: int):
    """All ways to cut 0 .. size into `count` runs."""
    for inner in itertools.combinations(range(1, size), count - 1):
        yield list(itertools.pairwise((0, *inner, size)))


@pytest.mark.parametrize("seed", range(8))
def test_split_has_the_smallest_largest_run(seed):
    lengths = random_lengths(seed, 9)
    for count in range(1, 10):
        runs = split(lengths, count)
        ordered = sorted(lengths)
        assert [lengths[i] for run in runs for i in run] == ordered and len(runs) == count
        best = min(max(sum(ordered[a:b]) for a, b in cut) for cut in cuts(9, count))
        assert max(sum(lengths[i] for i in run) for run in runs) == best


@pytest.mark.parametrize("seed", range(8))
def test_buckets_add_the_fewest_tokens(seed):
    lengths = random_lengths(seed, 9)
    for count in range(1, 12):
        runs = bucket(lengths, count)
        ordered = sorted(lengths)
        assert [lengths[i] for run in runs for i in run] == ordered and len(runs) <= count

        def added(parts: list[list[int]]) -> int:
            return sum(max(part) * len(part) - sum(part) for part in parts)

        best = min(added([ordered[a:b] for a, b in cut]) for n in range(1, min(count, 9) + 1) for cut in cuts(9, n))
        assert added([[lengths[i] for i in run] for run in runs]) == best


def test_partitions_are_all_there_are():
    degrees = (16, 8, 4, 2, 1)
    assert list(partitions(4, degrees)) == [(4,), (2, 2), (2, 1, 1), (1, 1, 1, 1)]
    assert [len(list(partitions(n, degrees))) for n in (1, 6, 8, 16)] == [1, 6, 10, 36]
    assert list(partitions(5, (4, 1))) == [(4, 1), (1, 1, 1, 1, 1)]


def check_wave(wave: Wave, lengths: list[int], num_devices: int, cost: CostModel) -> None:
    """Devices disjoint and aligned, memory kept to, and times that are those of the model."""
    devices = [d for group in wave.groups for d in range(group.first, group.first + group.degree)]
    assert len(set(devices)) == len(devices) and set(devices) <= set(range(num_devices))
    for group in wave.groups:
        own = [lengths[i] for i in group.prompts]
        assert own and group.first % group.degree == 0 and group.degree in (1, 2, 4, 8, 16)
        assert sum(own) * cost.token_bytes / group.degree <= cost.free_bytes
        assert group.time_s == pytest.approx(cost.time_s(group.degree, own))
    assert wave.time_s == max(group.time_s for group in wave.groups)


@pytest.mark.parametrize("num_devices", [1, 2, 6, 8, 16])
def test_every_plan_keeps_to_the_rules(num_devices):
    for seed in range(6):
        lengths = random_lengths(seed, 40, longest=COST.room_tokens(4 if num_devices > 3 else 1))
        waves = plan(lengths, num_devices, COST)
        assert sorted(i for wave in waves for group in wave.groups for i in group.prompts) == list(range(40))
        assert len(waves) >= sum(lengths) / COST.room_tokens(num_devices)
        for wave in waves:
            check_wave(wave, lengths, num_devices, COST)
            own = [lengths[i] for group in wave.groups for i in group.prompts]
            assert wave.time_s >= lower_bound_s(own, num_devices, COST) * (1 - 1e-9)


def test_more_waves_where_memory_is_short():
    short = dataclasses.replace(COST, free_bytes=1000 * COST.token_bytes)
    waves = plan([900] * 12, 4, short)
    assert len(waves) >= 3
    for wave in waves:
        check_wave(wave, [900] * 12, 4, short)
    with pytest.raises(CapacityError, match="a prompt has 4001 tokens, and a group of 4 devices has room for 4000"):
        plan([10, 4001], 4, short)
    assert plan([], 4, short) == []


def test_equal_lengths_get_equal_groups():
    for length in (500, 30_000):
        (wave,) = plan([length] * 8, 8, COST)
        assert [group.degree for group in wave.groups] == [1] * 8
    (wave,) = plan([50_000] * 4, 8, COST)  # more than one device has memory for
    assert [group.degree for group in wave.groups] == [2] * 4


def test_no_degree_without_a_bandwidth():
    some = dataclasses.replace(COST, bytes_per_s={4: 1e11})
    wave = form_wave([60_000, 50_000, 100], range(3), 8, some)
    assert wave
    assert {group.degree for group in wave.groups} <= {1, 4}


def test_a_giant_gets_a_wide_group_and_the_rest_narrow_ones():
    lengths = [60_000] + [400] * 256
    wave = form_wave(lengths, range(257), 8, COST)
    assert wave
    check_wave(wave, lengths, 8, COST)
    giant = next(group for group in wave.groups if 0 in group.prompts)
    assert giant.degree == 4
    assert all(group.degree < 4 for group in wave.groups if group is not giant)
    assert wave.time_s < min(COST.time_s(8, lengths), COST.time_s(1, lengths[:1]))


def test_the_program_of_integers_is_right_where_the_answer_is_known():
    """Two equal prompts: one device each. One alone: all devices. Memory for none: infinite."""
    assert optimum_s([5000, 5000], 2, COST) == pytest.approx(COST.time_s(1, [5000]))
    assert optimum_s([50_000], 4, COST) == pytest.approx(COST.time_s(4, [50_000]))
    assert optimum_s([50_000], 4, dataclasses.replace(COST, free_bytes=1e6)) == float("inf")


@pytest.mark.parametrize("count", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_greedy_is_near_the_best(count):
    ratios = []
    for seed in range(count):
        rng = random.Random(1000 + seed)
        num_devices, num_prompts = rng.choice([2, 4, 8]), rng.randint(1, 12)
        lengths = random_lengths(seed, num_prompts, longest=COST.room_tokens(num_devices) // 2)
        wave = form_wave(lengths, range(num_prompts), num_devices, COST)
        best_s = optimum_s(lengths, num_devices, COST)
        assert (wave is None) == (best_s == float("inf"))
        if wave:
            assert wave.time_s >= best_s * (1 - 1e-6), "better than the best: one of the two models is wrong"
            ratios.append(wave.time_s / best_s)
    print(f"{len(ratios)} waves: mean {sum(ratios) / len(ratios):.3f} of the best, worst {max(ratios):.3f}")
    assert max(ratios) < 1.5
    assert sum(ratios) / len(ratios) < 1.15
