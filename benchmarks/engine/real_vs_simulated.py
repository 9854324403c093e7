"""The same trace through the real engine and through the simulator, for several policies.

    python scripts/calibrate.py tiny -o tiny.json --max-num-seqs 16
    python benchmarks/engine/real_vs_simulated.py tiny --cost-model tiny.json

The cost model comes from other steps than those of the trace. Printed for each policy: throughput and times to the first
token, real and simulated; whether policies come in the same order; and whether the simulator makes the very plans of the
engine when it is given the instants at which the engine's steps ended. Wanted: the same order and plans, throughput and
median time to the first token within 15 %. The engine runs each policy `--repeats` times, in turns; medians are compared.
"""

import argparse
import random
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from record import append_line, machine

from jaxserve.build import build
from jaxserve.config import EngineConfig
from jaxserve.cost import files
from jaxserve.cost.model import CostModel
from jaxserve.scheduler.make import make_policy
from jaxserve.sim.call import Call, Span, Workload, make_workload
from jaxserve.sim.live import LatchedClock, LiveReplica, RepeatedReplica
from jaxserve.sim.replica import ReplicaSpec
from jaxserve.sim.report import report
from jaxserve.sim.run import run_on, simulate

SLOTS, LENGTH, BUDGET = 16, 512, 256
RESULTS = Path(__file__).resolve().parent.parent / "results" / "real_vs_simulated.jsonl"


def make_trace(count: int, rate: float, seed: int) -> Workload:
    """Calls of clients of whom one asks most, in programs of whom a few are long; prompts share nothing."""
    rng, now_s, calls = random.Random(seed), 0.05, list[Call]()
    for number in range(count):
        now_s += rng.expovariate(rate)
        is_heavy = rng.random() < 0.6
        client = "heavy" if is_heavy else f"light {rng.randrange(4)}"
        num_prompt = min(int(rng.lognormvariate(4.5, 0.7)) + 4, LENGTH - 140)
        num_output = min(int(rng.lognormvariate(3.8, 0.6)) + 2, 128)
        calls.append(
            Call(
                call_id=f"call-{number}",
                prompt=tuple(Span(rng.randrange(3, 500), 1) for _ in range(num_prompt)),
                output_tokens=num_output,
                arrival_s=now_s,
                client=client,
                program=f"{client} {rng.randrange(2 if is_heavy else 12)}",
            )
        )
    return make_workload("mixed", calls)


def run_live(model: str, policy: str, trace: Workload, cost: CostModel) -> tuple[dict[str, Any], bool]:
    """The engine's report, and whether the simulator repeats its plans."""
    clock = LatchedClock()
    config = EngineConfig(
        scheduling_policy=policy,
        max_num_seqs=SLOTS,
        max_model_len=LENGTH,
        max_num_batched_tokens=BUDGET,
        progress=False,
    )
    built = build(model, config, clock=clock)
    spec = spec_of(cost, built.facts["num_kv_blocks"])
    live = LiveReplica(0, spec, built.engine, built.executor, clock)
    facts = report(run_on([live], trace, knows_lengths=True))
    repeated = RepeatedReplica(0, spec, make_policy(policy, cost=cost), clock.instants)
    again = report(run_on([repeated], trace, knows_lengths=True))
    return facts, again["schedule_digest"] == facts["schedule_digest"]


def spec_of(cost: CostModel, num_blocks: int) -> ReplicaSpec:
    """As the engine is."""
    return ReplicaSpec(cost=cost, num_blocks=num_blocks, max_num_seqs=SLOTS, token_budget=BUDGET, max_model_len=LENGTH)


def figures(facts: dict[str, Any]) -> dict[str, float]:
    """What is compared."""
    return {
        "tokens_per_s": facts["tokens_per_s"],
        "ttft_p50_s": facts["ttft_s"]["p50"],
        "ttft_p99_s": facts["ttft_s"]["p99"],
        "latency_p50_s": facts["latency_s"]["p50"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("--cost-model", type=Path, required=True, help="made by scripts/calibrate.py on this machine")
    parser.add_argument("--policies", default="fcfs,plas,vtc")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rate", type=float, default=30.0, help="calls per second")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    policies = args.policies.split(",")
    cost = files.load(args.cost_model)
    trace = make_trace(args.count, args.rate, args.seed)
    real: dict[str, list[dict[str, float]]] = {policy: [] for policy in policies}
    same_plans = True
    for _ in range(args.repeats):
        for policy in policies:
            facts, repeats = run_live(args.model, policy, trace, cost)
            real[policy].append(figures(facts))
            same_plans &= repeats
    rows = {}
    for policy in policies:
        simulated = figures(report(simulate(trace, [spec_of(cost, 10_000)], policy, knows_lengths=True)))
        measured = {name: statistics.median(run[name] for run in real[policy]) for name in simulated}
        rows[policy] = {"real": measured, "simulated": simulated, "runs": real[policy]}
        ratios = ", ".join(
            f"{n} {measured[n]:.4g} / {simulated[n]:.4g} = {simulated[n] / measured[n]:.2f}" for n in simulated
        )
        print(f"{policy}: {ratios}  (real / simulated)")
    orders = [sorted(policies, key=lambda p: rows[p][kind]["ttft_p50_s"]) for kind in ("real", "simulated")]
    print(f"order by median time to the first token: real {orders[0]}, simulated {orders[1]}")
    print(f"plans repeated exactly, all runs: {same_plans}")
    options = {name: value for name, value in vars(args).items() if name != "cost_model"}
    line = {
        "benchmark": "real_vs_simulated",
        **options,
        "cost_model": cost.name,
        "rows": rows,
        "same_plans": same_plans,
    }
    append_line(RESULTS, line | {"machine": machine()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
