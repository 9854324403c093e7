"""Autellix's ATLAS against PLAS and call-by-call orders, where programs make many calls at the same time."""

import dataclasses
from typing import Any

from jaxserve.request import Request
from jaxserve.scheduler.levels import ProgramRow
from jaxserve.scheduler.policies.atlas import Atlas
from jaxserve.workload.generate import generate
from reproductions import picture
from reproductions.oracles import ShortestRemaining
from reproductions.replicas import mean
from reproductions.runs import A100, Policies, a100, compare
from reproductions.section import Options, Section, Table


@dataclasses.dataclass(slots=True)
class Scalar(Atlas):
    """ATLAS whose callers do not tell the parents of calls."""

    def _start(self, row: ProgramRow, request: Request) -> float:
        return row.longest


FCFS, PLAS, ATLAS, SCALAR = "FCFS of calls", "PLAS", "ATLAS", "ATLAS, parents untold"
WIDE = "ATLAS, first level of 256 tokens"
POLICIES: Policies = {
    FCFS: ("fcfs", {}),
    "MLFQ of calls": ("mlfq", {}),
    PLAS: ("plas", {}),
    ATLAS: ("atlas", {}),
    WIDE: ("atlas", {"first_bound": 256.0}),
    SCALAR: lambda workload: Scalar(),
    "SRPT of programs (oracle)": ShortestRemaining,
}
# Programs per second; the higher is about what the chip can serve.
WORKLOADS = {
    "map-reduce and chains": ("map-reduce", {"chain_share": 0.5}, (0.4, 0.6)),
    "tree search": ("tree-search", {}, (0.1, 0.2)),
}
SLOTS, HOST_BLOCKS = 48, 15_000
CLAIM = """4 to 15 times the throughput of programs at the same latency, ATLAS being PLAS for programs with parallel calls
(Autellix, 2025, arXiv 2502.13965, abstract; the text was not at hand). Expected: no worse than PLAS in mean latency."""
SETUP = """Half of the programs are map-reduce (8 to 32 chunks of 800 to 1,600 tokens at once, then one answer), half are
chains of 2 to 10 calls; and tree search in 16 rounds of 5 branches, each with a judgement after it (160 calls). {count}
programs, Poisson arrivals, {slots} slots, {chip}, {host} GB of host memory for who is preempted; {seeds}."""


def run(options: Options) -> Section:
    """Mean latency of programs, and per token of their longest path."""
    count, searches = (15, 4) if options.quick else (120, 24)
    figure, axes = picture.panels(2)
    tables, found = [], dict[str, list[float]]()
    for axis, (title, (workload, knobs, rates)) in zip(axes, WORKLOADS.items(), strict=True):
        reports = dict[float, Any]()
        for rate in rates:
            options.say(f"{title}, {rate:g} programs per second")
            size = count if workload == "map-reduce" else searches
            made = [generate(workload, count=size, rate=rate, seed=s, options=knobs) for s in range(options.seeds)]
            reports[rate] = compare(
                made, [a100(max_num_seqs=SLOTS, num_host_blocks=HOST_BLOCKS)], POLICIES, options.say
            )
        lines = []
        for name in POLICIES:
            line: dict[str, Any] = {"order": name}
            for rate in rates:
                line[f"{rate:g}/s mean s"] = round(mean(reports[rate][name], "program_latency_s.mean"), 1)
                line[f"{rate:g}/s p99 s"] = round(mean(reports[rate][name], "program_latency_s.p99"), 1)
                line[f"{rate:g}/s ms per token"] = round(1e3 * mean(reports[rate][name], "program_s_per_token.mean"), 1)
            lines.append(line)
            found.setdefault(name, []).extend(line[f"{rate:g}/s mean s"] for rate in rates)
        tables.append(Table(caption=f"{title.capitalize()}, latency of programs:", lines=lines))
        curves = {line["order"]: [(rate, line[f"{rate:g}/s mean s"]) for rate in rates] for line in lines}
        picture.curves(axis, curves, xlabel="programs per second", ylabel="mean s", title=title.capitalize())
    return Section(
        title="ATLAS: Autellix on programs with parallel calls",
        claim=CLAIM,
        setup=SETUP.format(
            count=f"{count} (tree search: {searches})", slots=SLOTS, chip=A100, host=63, seeds=options.seeds_text
        ),
        tables=tables,
        verdict=_verdict(found),
        pictures={picture.save(figure, options.pictures / "atlas.png"): "mean latency of programs against the rate"},
    )


def _verdict(found: dict[str, list[float]]) -> str:
    def ratios(name: str, other: str) -> str:
        values = [a / b for a, b in zip(found[name], found[other], strict=True)]
        return f"{min(values):.2f} to {max(values):.2f}"

    worse = [a > b for a, b in zip(found[ATLAS], found[FCFS], strict=True)]
    return (
        f"Mean latency of programs with ATLAS is {ratios(ATLAS, PLAS)} times that with PLAS, {ratios(SCALAR, PLAS)} times "
        f"where parents are not told, and {ratios(ATLAS, FCFS)} times that with FCFS of calls ({ratios(WIDE, FCFS)} with a "
        f"wider first level): worse in {sum(worse)} of {len(worse)} cases (docs/log.md says why)."
    )
