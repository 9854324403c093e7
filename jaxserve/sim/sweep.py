"""The highest rate of arrivals that still meets an SLO, by doubling and bisection."""

import math
from collections.abc import Callable
from typing import NamedTuple

PRECISION = 0.025  # of the rate, as in Sarathi-Serve's search for capacity (OSDI 2024, arXiv 2403.02310)
_MOST_DOUBLINGS = 20  # either way


class Trial(NamedTuple):
    """A workload at one rate."""

    rate: float  # per second
    share: float  # of calls within the SLO
    is_burst: bool  # everything came at once, as far as the replicas could tell


class Capacity(NamedTuple):
    """What a search found, and all that it tried."""

    rate: float  # per second; 0: not even the lowest tried is met
    is_bound: bool  # whether a higher rate failed; if not, the workload is too short to tell
    trials: tuple[Trial, ...]


def highest_rate(run_at: Callable[[float], Trial], wanted: float, start: float = 1.0) -> Capacity:
    """The highest rate at which the share of calls within the SLO is at least `wanted`, to 2.5 %.

    The share need not fall evenly: the search keeps one rate that is met, and one above it that is not.
    """
    trials: list[Trial] = []
    met, failed, rate = 0.0, math.inf, start
    for _ in range(_MOST_DOUBLINGS):
        trials.append(run_at(rate))
        if trials[-1].share >= wanted:
            met = max(met, rate)
        else:
            failed = min(failed, rate)
        if met and (failed < math.inf or trials[-1].is_burst):
            break
        rate = rate * 2 if met else rate / 2
    while met and met * (1 + PRECISION) < failed < math.inf:
        trials.append(run_at(math.sqrt(met * failed)))
        if trials[-1].share >= wanted:
            met = trials[-1].rate
        else:
            failed = trials[-1].rate
    return Capacity(met, failed < math.inf, tuple(trials))
