"""The highest rate of arrivals that still meets an SLO, by doubling and bisection."""

import math
from collections.abc import Callable
from typing import NamedTuple

PRECISION = 0.025  # of the rate, as in Sarathi-Serve's search for capacity (OSDI 2024, arXiv 2403.02310)
_MOST_STEPS = 24  # of doubling, either way


class Capacity(NamedTuple):
    """What a search found. `trials` are all rates that were tried, with the share of calls that met the SLO at each."""

    rate: float  # per second; 0: not even the lowest tried is met
    trials: tuple[tuple[float, float], ...]
    is_bound: bool  # whether a higher rate failed; if not, the workload is too short to tell


def highest_rate(share_at: Callable[[float], float], wanted: float, start: float = 1.0) -> Capacity:
    """The highest rate at which the share of calls within the SLO is at least `wanted`, to 2.5 %.

    `share_at` runs the workload at a rate. It need not fall evenly: the search keeps one rate that is met, and one
    above it that is not.
    """
    trials: list[tuple[float, float]] = []

    def is_met(rate: float) -> bool:
        trials.append((rate, share_at(rate)))
        return trials[-1][1] >= wanted

    met, failed = 0.0, math.inf
    rate = start
    for _ in range(_MOST_STEPS):
        if is_met(rate):
            met = max(met, rate)
        else:
            failed = min(failed, rate)
        if met and math.isfinite(failed):
            break
        rate = rate * 2 if met else rate / 2
    while met and math.isfinite(failed) and failed / met > 1 + PRECISION:
        middle = math.sqrt(met * failed)
        if is_met(middle):
            met = middle
        else:
            failed = middle
    return Capacity(met, tuple(trials), math.isfinite(failed))
