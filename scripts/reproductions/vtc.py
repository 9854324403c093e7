"""VTC (OSDI 2024, arXiv 2401.00588): clients with unequal loads get equal service, or what their weights say."""

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from jaxserve.cost.forms import Roofline
from jaxserve.cost.model import CostModel
from jaxserve.cost.roofline import reference
from jaxserve.sim.replica import ReplicaSpec
from jaxserve.sim.report import report
from jaxserve.sim.run import simulate
from jaxserve.workload.call import Call, Span, Workload, make_workload
from jaxserve.workload.lengths import arrivals
from reproductions import picture
from reproductions.section import Options, Section, Table

POOL, BLOCK, NUM_SEQS = 10_000, 16, 64  # tokens; the paper's pool
TOKENS = 256  # of each prompt, and of each answer
BOUND = 2 * 2 * POOL  # 2 * max(1 * longest prompt, 2 * tokens in the pool)
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
UNEQUAL = {"a": 1.5, "b": 3.0}  # calls per second
POLICIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "fcfs": ("fcfs", {}),
    "vtc": ("vtc", {}),
    "vtc, strict": ("vtc", {"strict": True}),
}


def a10g() -> CostModel:
    """Llama-2-7B on an A10G, as the paper has it: 60 % of its operations, 80 % of its bytes per second."""
    model = reference()
    assert isinstance(model.device, Roofline)
    device = dataclasses.replace(
        model.device,
        flop_per_s=0.6 * 125e12,
        bytes_per_s=0.8 * 600e9,
        token_flop=2 * 6.7e9,
        weight_bytes=13.5e9,
        kv_bytes=524_288.0,
    )
    return dataclasses.replace(model, name="Llama-2-7B on A10G", device=device, block_bytes=524_288.0 * BLOCK)


def run(options: Options) -> Section:
    """Two clients of unequal load; one that pauses; four of unequal weight."""
    end_s = 60.0 if options.quick else 600.0
    seeds = range(options.seeds)
    unequal = {name: [serve(name, UNEQUAL, end_s, seed) for seed in seeds] for name in POLICIES}
    options.say("two clients: done")
    pausing = {name: [serve(name, UNEQUAL, end_s, seed, pauses=("a",)) for seed in seeds] for name in POLICIES}
    options.say("one pauses: done")
    weighted = [serve("vtc", dict.fromkeys(WEIGHTS, 1.5), end_s, seed, weights=WEIGHTS) for seed in seeds]
    options.say("weights: done")
    figure, (left, right) = picture.panels(2)
    for axis, name in ((left, "fcfs"), (right, "vtc")):
        picture.curves(axis, unequal[name][0]["curves"], xlabel="s", ylabel="service of the client", title=name)
    file = picture.save(figure, options.pictures / "vtc.png")
    shares = {
        client: statistics.median(each["fairness"]["clients"][client]["output_tokens"] for each in weighted)
        / statistics.median(each["fairness"]["clients"]["a"]["output_tokens"] for each in weighted)
        for client in WEIGHTS
    }
    worst = max(each["fairness"]["worst_gap"] for each in (*unequal["vtc, strict"], *pausing["vtc, strict"]))
    return Section(
        title="VTC: the same service for clients who ask for more than there is",
        claim="While two clients both have requests waiting, their services differ by at most 2 * max(w_p * L, w_q * M),"
        f" here {BOUND:,}; first come, first served gives in proportion to what is asked for, without a limit (OSDI 2024,"
        " arXiv 2401.00588; Llama-2-7B on an A10G, a pool of 10,000 tokens). Weights share service in proportion.",
        setup=f"The paper's: a pool of {POOL:,} tokens, prompts and answers of {TOKENS}, two clients who send 1.5 and 3"
        f" calls/s (Poisson), which is too much, {end_s:.0f} s. Then the same, but the slower client is silent in every"
        " second minute. Then four clients with weights 1 to 4 and 1.5 calls/s each. A roofline of Llama-2-7B on an A10G;"
        " chunks and preemption are ours.",
        tables=[
            Table(caption="Two clients, both always too fast:", lines=[_line(n, unequal[n]) for n in POLICIES]),
            Table(caption="The slower one pauses for minutes:", lines=[_line(n, pausing[n]) for n in POLICIES]),
            Table(
                caption="Answer tokens by weight, those of the first client being 1 (what is computed again after a"
                " preemption is not charged, but is in the service of the tables above):",
                lines=[{f"weight {WEIGHTS[c]:g}": f"{share:.2f}" for c, share in shares.items()}],
            ),
        ],
        verdict=_verdict(unequal, pausing, shares, worst),
        pictures={file: "service of two clients over time, first come first served and VTC"},
    )


def serve(
    name: str,
    rates: Mapping[str, float],
    end_s: float,
    seed: int,
    *,
    pauses: Sequence[str] = (),
    weights: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """All figures of one policy, and `curves`: service of each client over time."""
    policy, policy_options = POLICIES[name]
    if weights:
        policy_options = {**policy_options, "weights": dict(weights)}
    spec = ReplicaSpec(
        cost=a10g(),
        num_blocks=POOL // BLOCK,
        block_size=BLOCK,
        max_num_seqs=NUM_SEQS,
        token_budget=2048,
        max_model_len=2048,
    )
    curves: dict[str, list[tuple[float, float]]] = {client: [(0.0, 0.0)] for client in rates}
    run = simulate(clients(rates, end_s, seed, pauses), [spec], policy, policy_options, watch=_until(end_s))
    for client, record in sorted(
        ((record.call.client, record) for record in run.records if record.finish_s is not None),
        key=lambda each: each[1].finish_s or 0.0,
    ):
        last = curves[client][-1][1]
        curves[client].append((record.finish_s or 0.0, last + record.num_prompt + 2 * record.num_output))
    thinned = {client: points[:: max(len(points) // 25, 1)] for client, points in curves.items()}
    return report(run) | {"curves": thinned}


def clients(rates: Mapping[str, float], end_s: float, seed: int, pauses: Sequence[str]) -> Workload:
    """Poisson arrivals of each client; some are silent in every second minute."""
    tokens, calls = itertools.count(1), list[Call]()
    for client, rate in rates.items():
        rng = Random(f"{client} {seed}")
        for arrival_s in arrivals(rng, int(rate * end_s * 1.3), rate):
            if arrival_s < end_s and not (client in pauses and int(arrival_s // 60) % 2):
                calls.append(
                    Call(
                        call_id=f"{client}{len(calls)}",
                        prompt=(Span(next(tokens), TOKENS),),
                        output_tokens=TOKENS,
                        arrival_s=arrival_s,
                        client=client,
                    )
                )
    return make_workload("clients", calls)


def _until(end_s: float) -> Any:
    def stop(ended: int, now_s: float) -> None:
        if now_s >= end_s:
            raise KeyboardInterrupt  # what waits then is left

    return stop


def _line(name: str, facts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    def middle(value: Any) -> float:
        return statistics.median(map(value, facts))

    line = {"policy": name, "calls/s": f"{middle(lambda each: each['requests_per_s']):.2f}"}
    for client in UNEQUAL:
        line[f"service of {client}"] = f"{middle(lambda each, c=client: each['fairness']['service'][c]):,.0f}"
    for client in UNEQUAL:
        ttft = middle(lambda each, c=client: each["fairness"]["clients"][c]["ttft_s"]["p50"])
        line[f"median TTFT of {client}, s"] = f"{ttft:.1f}"
    return line | {
        "worst gap": f"{middle(lambda each: each['fairness']['worst_gap']):,.0f}",
        "Jain index": f"{middle(lambda each: each['fairness']['jain']):.3f}",
    }


def _verdict(
    unequal: Mapping[str, Sequence[Mapping[str, Any]]],
    pausing: Mapping[str, Sequence[Mapping[str, Any]]],
    shares: Mapping[str, float],
    worst: float,
) -> str:
    def gap(facts: Sequence[Mapping[str, Any]]) -> float:
        return statistics.median(each["fairness"]["worst_gap"] for each in facts)

    off = max(abs(share / WEIGHTS[client] - 1) for client, share in shares.items())
    return (
        f"The strict gap is at most {worst:,.0f}, {'within' if worst <= BOUND else 'ABOVE'} the bound of {BOUND:,}; first"
        f" come, first served comes to {gap(unequal['fcfs']):,.0f} and grows with time ({gap(pausing['fcfs']):,.0f} where"
        f" one pauses). Where others may pass a request that finds no room the gap is"
        f" {gap(unequal['vtc']) / gap(unequal['vtc, strict']):.2f} times the strict one. Weights are met within {off:.0%}."
    )
