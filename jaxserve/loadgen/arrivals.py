"""When requests are due, in seconds from the start."""

import math
from collections.abc import Sequence
from random import Random

from jaxserve.errors import ConfigError
from jaxserve.workload.call import Workload
from jaxserve.workload.lengths import arrivals


def random_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """`rate` per second; `inf`: all at once.

    `burstiness` is the shape of the gamma distribution of the times between them: 1 a Poisson process, below 1 bursts,
    above 1 more even.

    Raises:
      ConfigError: a rate or a burstiness that is not above 0.
    """
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"--burstiness {burstiness:g} must be above 0")
    return arrivals(Random(f"arrivals {seed}"), count, checked_rate(rate), cv=burstiness**-0.5)


def replayed(workload: Workload, rate: float | None) -> Workload:
    """A trace with its own times; with a rate the same pattern, faster or slower; with `inf` all at once."""
    if rate is None:
        return workload
    return workload.at_rate(checked_rate(rate))


def checked_rate(rate: float) -> float:
    """A rate that is above 0.

    Raises:
      ConfigError: it is not.
    """
    if not rate > 0:
        raise ConfigError(f"--request-rate {rate:g} must be above 0 (inf: all at once)")
    return rate


def peak(spans: Sequence[tuple[float, float]]) -> int:
    """The largest number of spans (from, to) that hold one moment in common."""
    steps = sorted([(begin, 1) for begin, _ in spans] + [(end, -1) for _, end in spans])
    most = level = 0
    for _, step in steps:
        level += step
        most = max(most, level)
    return most
