"""Simulations of workloads under several policies."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.cost.roofline import reference
from jaxserve.scheduler.policy import Policy
from jaxserve.sim.replica import ReplicaSpec
from jaxserve.sim.report import report
from jaxserve.sim.run import simulate
from jaxserve.workload.call import Workload

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
