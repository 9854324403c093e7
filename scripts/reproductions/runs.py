"""Simulations of one workload under several policies, and means over seeds."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.cost.roofline import reference
from jaxserve.scheduler.policy import Policy
from jaxserve.sim.call import Workload
from jaxserve.sim.replica import ReplicaSpec
from jaxserve.sim.report import report
from jaxserve.sim.run import Run, simulate

# By name, with options; or made for a workload.
Policies = Mapping[str, tuple[str, Mapping[str, Any]] | Callable[[Workload], Policy]]

A100 = "an 8B model on an A100 (the reference cost model, `cost/roofline.py`)"


def a100(**sizes: Any) -> ReplicaSpec:
    """One replica of the reference model, with the KV pool that 80 GB leave for it."""
    return ReplicaSpec(**{"cost": reference(), "num_blocks": 10_000, "token_budget": 2048} | sizes)


def compare(
    workloads: Sequence[Workload],
    specs: Sequence[ReplicaSpec],
    policies: Policies,
    say: Callable[[str], None],
) -> dict[str, list[dict[str, Any]]]:
    """Reports of every policy, one for each workload."""
    reports: dict[str, list[dict[str, Any]]] = {}
    for name, policy in policies.items():
        for workload in workloads:
            say(f"{workload.name}: {name}")
            if isinstance(policy, tuple):
                run = simulate(workload, specs, policy[0], policy[1])
            else:
                run = simulate(workload, specs, lambda p=policy, w=workload: p(w))
            reports.setdefault(name, []).append(report(run))
    return reports


def mean(reports: Sequence[Mapping[str, Any]], *keys: str) -> float:
    """Over reports: of a number, or of one in a dictionary."""

    def value(facts: Any) -> float:
        for key in keys:
            facts = facts[key]
        return facts

    return statistics.fmean(map(value, reports))


def of_programs(run: Run) -> list[float]:
    """Seconds from the first arrival to the last answer of each program that has ended."""
    first, last = dict[str, float](), dict[str, float]()
    for record in run.records:
        name = record.call.program
        first[name] = min(first.get(name, record.arrival_s), record.arrival_s)
        last[name] = max(last.get(name, 0.0), math.inf if record.finish_s is None else record.finish_s)
    return [last[name] - first[name] for name in first if math.isfinite(last[name])]
