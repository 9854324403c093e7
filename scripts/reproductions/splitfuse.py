"""Dynamic SplitFuse (DeepSpeed-FastGen, 2024, arXiv 2401.08671): steps of one size, long prompts cut, short ones joined."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from reproductions import picture
from reproductions.sarathi import FIRST, WHOLE, Mode, PrefillFirst, serve
from reproductions.section import Options, Section, Table

RATES = (2.0, 4.0, 5.0)  # calls per second
SPLITFUSE, CHUNKS = "splitfuse", "chunks, 2048 a step"
MODES = {
    FIRST: Mode(chunked=False, scheduler=PrefillFirst),
    WHOLE: Mode(chunked=False),
    CHUNKS: Mode(budget=2048),
    SPLITFUSE: Mode(budget=2048, policy="splitfuse"),
}


def run(options: Options) -> Section:
    """Latency and tails at several rates."""
    count, rates = (40, RATES[:2]) if options.quick else (400, RATES)
    facts = {
        name: {rate: [serve(mode, rate, count, seed) for seed in range(options.seeds)] for rate in rates}
        for name, mode in MODES.items()
    }
    figure, (left, right) = picture.panels(2)
    for axis, key, level, title in (
        (left, "latency_s", "mean", "mean latency, s"),
        (right, "tbt_s", "p99", "p99 TBT, s"),
    ):
        series = {name: [(rate, middle(facts[name][rate], key, level)) for rate in rates] for name in MODES}
        picture.curves(axis, series, xlabel="calls/s", ylabel=title)
    right.set_yscale("log")
    file = picture.save(figure, options.pictures / "splitfuse.png")
    return Section(
        title="Dynamic SplitFuse: steps of one size",
        claim="Up to 2.3 times the effective throughput, half the mean latency, and up to 3.7 times shorter tails between"
        " tokens than vLLM of its time (arXiv 2401.08671, abstract; Llama-2 7B, 13B and 70B on A100, H100, A6000).",
        setup=f"{count} calls, prompts lognormal (median 1100, at most 8000), answers lognormal (median 181), as for Sarathi"
        " above; an 8B model on an A100 as a roofline (`cost.reference`). `splitfuse` takes the size from which on a step"
        " takes longer in proportion, by the cost model. Prompts-first is vLLM's order of that time.",
        tables=[
            Table(
                caption=f"At {rate:g} calls/s (medians over seeds):",
                lines=[line(name, facts[name][rate]) for name in MODES],
            )
            for rate in rates
        ],
        verdict=verdict(facts, rates[-1]),
        pictures={file: "mean latency and p99 between tokens against the rate"},
    )


def middle(facts: Sequence[Mapping[str, Any]], key: str, level: str) -> float:
    """Median over seeds."""
    return statistics.median(each[key][level] for each in facts)


def line(name: str, facts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of a table."""
    return {
        "mode": name,
        "mean latency, s": f"{middle(facts, 'latency_s', 'mean'):.2f}",
        "p99 TTFT, s": f"{middle(facts, 'ttft_s', 'p99'):.2f}",
        "p50 TBT, ms": f"{1e3 * middle(facts, 'tbt_s', 'p50'):.1f}",
        "p99 TBT, ms": f"{1e3 * middle(facts, 'tbt_s', 'p99'):.1f}",
    }


def verdict(facts: Mapping[str, Mapping[float, Sequence[Mapping[str, Any]]]], rate: float) -> str:
    """In words."""
    first, ours, chunks = (facts[name][rate] for name in (FIRST, SPLITFUSE, CHUNKS))
    mean = middle(first, "latency_s", "mean") / middle(ours, "latency_s", "mean")
    tail = middle(first, "tbt_s", "p99") / middle(ours, "tbt_s", "p99")
    other = middle(chunks, "tbt_s", "p99") / middle(ours, "tbt_s", "p99")
    return (
        f"At {rate:g} calls/s the mean latency of prompts first is {mean:.2f} times that of splitfuse (paper: 2), its p99"
        f" between tokens {tail:.1f} times (paper: up to 3.7); chunks of 2,048 have {other:.1f} times the p99 of splitfuse."
        " Paid for by the first token, whose p99 is later. Prompts-first here has none of what vLLM did to soften it, so its"
        " tail is worse than the paper's baseline."
    )
