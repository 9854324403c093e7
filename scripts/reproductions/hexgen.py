"""HexGen-Text2SQL's two levels: dispatch to unequal engines, and least slack first on each."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxserve.cost.forms import Fitted
from jaxserve.cost.model import CostModel
from jaxserve.scheduler.policies.fcfs import Fcfs
from jaxserve.scheduler.policies.hexgen import Hexgen
from jaxserve.scheduler.policy import Policy
from jaxserve.scheduler.workflow import Workflow
from jaxserve.sim.replica import ReplicaSpec
from jaxserve.sim.run import Run, simulate
from jaxserve.sim.workload import generate
from reproductions import picture
from reproductions.runs import of_programs
from reproductions.section import Options, Section, Table

BASE_S = 52.95  # the paper's code: all stages of a question, each as long as on average
# Seconds of a decode step and of a prompt token. Decodes: profiles in the paper's repository; prompts: assumed.
ENGINES = {"A100": (0.035, 0.9e-3), "A6000": (0.058, 1.8e-3), "L40S": (0.0545, 1.0e-3)}
SLOTS, SLOWER = 4, 0.12  # by each further call at the same time
RATES = (0.02, 0.025, 0.03, 0.035)  # three such engines serve about 0.038 questions per second
FEW_LATE = 95  # per cent of questions that must be in time
CLAIM = """Deadlines up to 1.67 times as tight (1.41 on average) and up to 1.75 times the throughput (1.65) of vLLM with even
dispatch and FCFS (HexGen-Text2SQL, 2025, arXiv 2505.05286, abstract)."""
SETUP = """Questions to a database in the paper's stages and token counts (20 % more or less), 1 to 3 candidates at once, 0
to 5 revisions; {count} questions, Poisson arrivals, {seeds}. A 70B model in 4 bits on one A100, one A6000 and one L40S:
{slots} calls at once each, each further one slows a decode step by {slower:.0%}; decode times are those of the paper's
repository, prompt times are assumed. Balanced dispatch is `hexgen` with alpha 0.2, urgency `hexgen` with least slack. The
scale is the deadline that {share} % of the questions keep, in units of {base} s. Deadlines given to the policy are those
that FCFS with the same dispatch keeps, then those that it reached itself with these ("tighter"). All replicas share what
is learned of stages."""


def specs() -> list[ReplicaSpec]:
    """One replica of each type."""
    found = []
    for name, (decode_s, token_s) in ENGINES.items():
        curve = tuple((rows, decode_s * (1 + SLOWER * (rows - 1))) for rows in range(1, SLOTS + 1))
        device = Fitted(decode=curve, mixed=((1, decode_s), (2048, decode_s + 2048 * token_s)))
        cost = CostModel(name=name, device=device)
        found.append(ReplicaSpec(cost=cost, num_blocks=4000, max_num_seqs=SLOTS, token_budget=2048, engine_type=name))
    return found


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
    workload = generate("text-to-sql", count=count, rate=rate, seed=seed, options={"deadline_s": scale * BASE_S})
    return simulate(workload, specs(), policy, router=dispatch)


def needed(run: Run) -> float:
    """The scale that enough questions keep."""
    return float(np.percentile(of_programs(run), FEW_LATE)) / BASE_S


def run(options: Options) -> Section:
    """Scales by rate, dispatch and order; then modes of the policy at one rate."""
    rates, count = (RATES[1:2], 20) if options.quick else (RATES, 150)
    scales, modes = dict[str, dict[float, float]](), list[dict[str, Any]]()
    for rate in rates:
        for words, dispatch in (("even", "round_robin"), ("balanced", "hexgen")):
            options.say(f"{rate:g} questions per second, {words} dispatch")
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
    labels = {"xlabel": "questions per second", "ylabel": f"deadline for {FEW_LATE} %, x {BASE_S} s"}
    picture.curves(axes[0], shown, title="Tightest deadline", **labels)
    setup = SETUP.format(count=count, slots=SLOTS, slower=SLOWER, share=FEW_LATE, base=BASE_S, seeds=options.seeds_text)
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
