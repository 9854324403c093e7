"""What the reproductions of routers share: runs over several replicas, and means over seeds."""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.sim.replica import ReplicaSpec
from jaxserve.sim.report import report
from jaxserve.sim.run import simulate
from jaxserve.workload.call import Workload

Report = Mapping[str, Any]


def reports(make: Callable[[int], Workload], specs: Sequence[ReplicaSpec], seeds: int, **how: Any) -> list[Report]:
    """One report for each seed. `make`: the workload of a seed; `how`: arguments of `simulate`."""
    return [report(simulate(make(seed), specs, **how)) for seed in range(seeds)]


def value(each: Report, path: str) -> float:
    """`ttft_s.p99` of a report."""
    return functools.reduce(lambda part, key: part[key], path.split("."), each)


def mean(several: Sequence[Report], path: str) -> float:
    """Over seeds."""
    return statistics.fmean(value(each, path) for each in several)


def spread(several: Sequence[Report], path: str, digits: int = 2, scale: float = 1.0) -> str:
    """`1.20 (1.10 to 1.30)`: the mean over seeds, and the smallest and largest."""
    values = [value(each, path) * scale for each in several]
    text = f"{statistics.fmean(values):,.{digits}f}"
    return text if len(values) < 2 else f"{text} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
