"""Autellix's PLAS against call-by-call orders, on chains of calls."""

import itertools
from collections.abc import Sequence
from typing import Any

from jaxserve.workload.generate import generate
from reproductions import picture
from reproductions.oracles import FirstProgram, ShortestRemaining
from reproductions.replicas import mean
from reproductions.runs import A100, Policies, a100, compare
from reproductions.section import Options, Section, Table

FCFS, MLFQ, PLAS, SRPT = "FCFS of calls", "MLFQ of calls", "PLAS", "SRPT of programs (oracle)"
POLICIES: Policies = {
    FCFS: ("fcfs", {}),
    MLFQ: ("mlfq", {}),
    PLAS: ("plas", {}),
    SRPT: ShortestRemaining,
    "FCFS of programs": lambda workload: FirstProgram(),
}
RATES = (1.0, 2.0, 2.5, 3.0)
SLOTS = 24
CLAIM = """4 to 15 times the throughput of programs at the same latency as vLLM and others, on chats, tool calls, tree search
and a mix of them (Autellix, 2025, arXiv 2502.13965, abstract; the text was not at hand)."""
SETUP = """Chains of calls (60 % of programs make 1 to 4, 30 % 5 to 15, 10 % 40 to 120; 100 to 600 prompt tokens, answers
around 67), {count} programs, Poisson arrivals, {slots} slots, {chip}; {seeds}. The pool is large, so that
who is preempted finds nearly all of it in the prefix cache. Latency per token: from the first arrival of a program to its
last answer, over its answer tokens, mean over programs. The oracle knows all lengths."""


def run(options: Options) -> Section:
    """Mean and tail of program latency per token at several rates."""
    rates, count = (RATES[1:3], 40) if options.quick else (RATES, 300)
    reports = dict[float, Any]()
    for rate in rates:
        workloads = [generate("chains", count=count, rate=rate, seed=seed) for seed in range(options.seeds)]
        options.say(f"{rate:g} programs per second")
        reports[rate] = compare(workloads, [a100(max_num_seqs=SLOTS)], POLICIES, options.say)

    def series(path: str, times: float = 1.0) -> dict[str, list[tuple[float, float]]]:
        return {name: [(r, times * mean(reports[r][name], path)) for r in rates] for name in POLICIES}

    means, tails = series("program_s_per_token.mean", 1e3), series("program_latency_s.p99")
    preempted = series("preemptions")
    figure, axes = picture.panels(2)
    for axis, shown, unit in ((axes[0], means, "mean ms per token"), (axes[1], tails, "p99 of seconds")):
        some = {name: points for name, points in shown.items() if name in (FCFS, MLFQ, PLAS, SRPT)}
        picture.curves(axis, some, xlabel="programs per second", ylabel=unit, title="Latency of programs")
    return Section(
        title="PLAS: Autellix on chains of calls",
        claim=CLAIM,
        setup=SETUP.format(count=count, slots=SLOTS, chip=A100, seeds=options.seeds_text),
        tables=[
            Table(caption="Mean milliseconds per token, by programs per second:", lines=_lines(means)),
            Table(caption="p99 of program latency in seconds:", lines=_lines(tails)),
            Table(caption="Preemptions:", lines=_lines(preempted)),
        ],
        verdict=_verdict(means, tails),
        pictures={picture.save(figure, options.pictures / "plas.png"): "latency of programs against the rate"},
    )


def _lines(series: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    return [{"order": name, **{f"{rate:g}": round(value, 1) for rate, value in at}} for name, at in series.items()]


def _verdict(means: Any, tails: Any) -> str:
    def ratios(name: str, other: str, series: Any) -> tuple[float, float]:
        found = [a / b for (_, a), (_, b) in zip(series[name], series[other], strict=True)]
        return min(found), max(found)

    gain, oracle, tail = ratios(FCFS, PLAS, means), ratios(PLAS, SRPT, means), ratios(PLAS, FCFS, tails)
    loaded = [i for i, (_, value) in enumerate(means[FCFS]) if value > 1.2 * means[SRPT][i][1]]
    between = all(means[SRPT][i][1] < means[PLAS][i][1] < means[MLFQ][i][1] for i in loaded)
    limit = 1.5 * means[FCFS][0][1]
    served = [_rate_at(means[name], limit) for name in (FCFS, PLAS)]
    return (
        f"The mean is {gain[0]:.2f} to {gain[1]:.2f} times as good as with FCFS of calls; under load PLAS is "
        f"{'between MLFQ and the oracle' if between else 'not always between MLFQ and the oracle'}, at {oracle[0]:.2f} to "
        f"{oracle[1]:.2f} times the oracle. p99 of program latency is {tail[0]:.2f} to {tail[1]:.2f} times that of FCFS. "
        f"At {limit:.0f} ms per token FCFS serves {served[0]:.2f} programs per second and PLAS {served[1]:.2f}: "
        f"{served[1] / served[0]:.2f} times, not 4 to 15 times. The paper measures against engines of its time, on its own "
        "traces; the direction is reproduced, the factor is not."
    )


def _rate_at(points: Sequence[tuple[float, float]], limit: float) -> float:
    """The rate at which a curve crosses a limit, on straight lines between points; its last, if it never does."""
    for (left, low), (right, high) in itertools.pairwise(points):
        if low <= limit < high:
            return left + (right - left) * (limit - low) / (high - low)
    return points[-1][0]
