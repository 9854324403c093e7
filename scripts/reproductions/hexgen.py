"""HexGen-Text2SQL's two levels: dispatch to unequal engines, and least slack first on each."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxserve.scheduler.policies.fcfs import Fcfs
from jaxserve.scheduler.policies.hexgen import Hexgen
from jaxserve.scheduler.policy import Policy
from jaxserve.scheduler.workflow import Workflow
from jaxserve.sim.run import Run, simulate
from jaxserve.workload.generate import generate
from reproductions import picture
from reproductions.hexgen_dispatch import DEADLINE_S, DECODE_S, query_s, replica
from reproductions.section import Options, Section, Table

RATES = (0.04, 0.06, 0.08)  # of queries per second
FEW_LATE = 95  # per cent of queries that must be in time
CLAIM = """Deadlines up to 1.67 times as tight (1.41 on average) and up to 1.75 times the throughput (1.65) of vLLM with even
dispatch and FCFS (HexGen-Text2SQL, 2025, arXiv 2505.05286, abstract)."""
SETUP = """Queries, engines and their assumed times as in the section on dispatch; {count} queries, {seeds}, prefixes are not
shared. Balanced dispatch is the router `hexgen` with alpha 0.2, urgency the policy `hexgen` with least slack. The scale
is the deadline that {share} % of the queries keep, in units of {base} s. The policy is given the deadline that FCFS with
the same dispatch keeps, then ("tighter") the one that it kept itself. Policies of all engines share what is learned of
stages."""


def urgent(mode: str) -> Callable[[], Policy]:
    """A maker of policies, one for each replica, that learn together."""
    shared = Workflow()

    def make() -> Policy:
        policy = Hexgen(mode=mode)
        policy.workflow = shared
        return policy

    return make


def ask(rate: float, count: int, seed: int, dispatch: str, policy: Callable[[], Policy], scale: float) -> Run:
    """One run with deadlines of so many times the base."""
    workload = generate("text-to-sql", count=count, rate=rate, seed=seed, options={"deadline_s": scale * DEADLINE_S})
    return simulate(workload, [replica(name) for name in DECODE_S], policy, router=dispatch)


def needed(run: Run) -> float:
    """The scale that enough queries keep."""
    return float(np.percentile(query_s(run), FEW_LATE)) / DEADLINE_S


def run(options: Options) -> Section:
    """Scales by rate, dispatch and order; then modes of the policy at one rate."""
    rates, count = (RATES[1:2], 20) if options.quick else (RATES, 100)
    scales, modes = dict[str, dict[float, float]](), list[dict[str, Any]]()
    for rate in rates:
        for words, dispatch in (("even", "round_robin"), ("balanced", "hexgen")):
            options.say(f"{rate:g} queries per second, {words} dispatch")
            fcfs = [needed(ask(rate, count, seed, dispatch, Fcfs, 1.0)) for seed in range(options.seeds)]
            tight = [
                needed(ask(rate, count, seed, dispatch, urgent("least_slack"), scale))
                for seed, scale in enumerate(fcfs)
            ]
            again = [
                needed(ask(rate, count, seed, dispatch, urgent("least_slack"), scale))
                for seed, scale in enumerate(tight)
            ]
            for name, found in (("FCFS", fcfs), ("urgency", tight), ("urgency, tighter", again)):
                scales.setdefault(f"{words} dispatch, {name}", {})[rate] = float(np.mean(found))
            if rate == rates[-1] and dispatch == "hexgen":
                for mode in ("edf", "moore_hodgson"):
                    found = [
                        needed(ask(rate, count, seed, dispatch, urgent(mode), scale)) for seed, scale in enumerate(fcfs)
                    ]
                    modes.append({"mode": mode, f"scale at {rate:g}/s": round(float(np.mean(found)), 2)})
    lines = [{"order": name, **{f"{r:g}/s": round(v, 2) for r, v in at.items()}} for name, at in scales.items()]
    figure, axes = picture.panels(1)
    shown = {name: list(at.items()) for name, at in scales.items() if "tighter" not in name}
    labels = {"xlabel": "queries per second", "ylabel": f"deadline for {FEW_LATE} %, x {DEADLINE_S} s"}
    picture.curves(axes[0], shown, title="Tightest deadline", **labels)
    setup = SETUP.format(count=count, share=FEW_LATE, base=DEADLINE_S, seeds=options.seeds_text)
    return Section(
        title="HexGen-Text2SQL: deadlines of stages, unequal engines",
        claim=CLAIM,
        setup=setup,
        tables=[
            Table(caption=f"Scale of the deadline that {FEW_LATE} % keep:", lines=lines),
            Table(caption="Other modes of the policy, balanced dispatch:", lines=modes),
        ],
        verdict=_verdict(scales),
        pictures={picture.save(figure, options.pictures / "hexgen.png"): "the tightest deadline against the rate"},
    )


def _verdict(scales: dict[str, dict[float, float]]) -> str:
    def ratios(name: str, other: str) -> str:
        found = [scales[name][rate] / scales[other][rate] for rate in scales[name]]
        return f"{min(found):.2f} to {max(found):.2f} ({np.mean(found):.2f} on average)"

    alone, both = "even dispatch, FCFS", "balanced dispatch, urgency"
    return (
        f"Both levels together keep deadlines {ratios(alone, both)} times as tight as even dispatch and FCFS; dispatch "
        f"alone {ratios(alone, 'balanced dispatch, FCFS')}; urgency alone, with even dispatch, "
        f"{ratios(alone, 'even dispatch, urgency')}, and on top of balanced dispatch "
        f"{ratios('balanced dispatch, FCFS', both)}."
    )
