"""The best possible wave, by a program of integers. Takes seconds: for checking `flexsp.form_wave`, not for serving."""

import math
from collections.abc import Sequence

import numpy as np

from jaxserve.scheduler.flexsp import CostModel, bucket

NUM_BUCKETS = 16


def optimum_s(
    lengths: Sequence[int], num_devices: int, cost: CostModel, *, num_buckets: int = NUM_BUCKETS, limit_s: float = 60.0
) -> float:
    """The time of the best wave of these prompts, each taken to be as long as the longest of its bucket; inf if none fits.

    Raises: TimeoutError if the best is not proven after `limit_s`.

    Source: FlexSP, arXiv 2412.01523, section 4.1.
    """
    from scipy.optimize import milp  # comes with JAX, which the host side does without

    runs = bucket(lengths, num_buckets)
    longest = [max(lengths[i] for i in run) for run in runs]
    counts = [len(run) for run in runs]
    degrees = [degree for degree in cost.degrees(num_devices) for _ in range(num_devices // degree)]
    num_groups, num_runs = len(degrees), len(runs)
    # Variables: the time; whether each group is used; how many prompts of each run it gets.
    size = 1 + num_groups + num_runs * num_groups

    def used(group: int) -> int:
        return 1 + group

    def given(run: int, group: int) -> int:
        return 1 + num_groups + run * num_groups + group

    rows, lows, highs = list[np.ndarray](), list[float](), list[float]()

    def constrain(terms: dict[int, float], low: float, high: float) -> None:
        row = np.zeros(size)
        for variable, factor in terms.items():
            row[variable] = factor
        rows.append(row)
        lows.append(low)
        highs.append(high)

    for group, degree in enumerate(degrees):
        times = {given(run, group): cost.work_s(longest[run], degree) for run in range(num_runs)}
        constrain({0: -1.0, used(group): cost.fixed_s(degree), **times}, -math.inf, 0.0)
        tokens = {given(run, group): float(longest[run]) for run in range(num_runs)}
        constrain(tokens, -math.inf, float(cost.room_tokens(degree)))
        prompts = {given(run, group): 1.0 for run in range(num_runs)}
        constrain({used(group): -float(len(lengths)), **prompts}, -math.inf, 0.0)
        constrain({used(group): 1.0}, 0.0, 1.0)
        if group and degrees[group - 1] == degree:  # groups of one degree are alike: use the first ones
            constrain({used(group - 1): 1.0, used(group): -1.0}, 0.0, math.inf)
    constrain({used(group): float(degree) for group, degree in enumerate(degrees)}, -math.inf, float(num_devices))
    for run, count in enumerate(counts):
        constrain({given(run, group): 1.0 for group in range(num_groups)}, count, count)

    found = milp(
        np.eye(1, size)[0],
        integrality=np.array([0, *[1] * (size - 1)]),
        constraints=(np.array(rows), np.array(lows), np.array(highs)),
        options={"time_limit": limit_s},
    )
    if found.status == 2:
        return math.inf
    if found.status != 0:
        raise TimeoutError(f"{len(lengths)} prompts over {num_devices} devices: {found.message}")
    return float(found.fun)
