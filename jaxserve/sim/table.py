"""Reports side by side, as text: a row for each figure, a column for each run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_GIB = 1 << 30
_SPREAD = ("mean", "p50", "p90", "p99")
_TIMES = (
    ("time to first token", "ttft_s"),
    ("time per token", "tpot_s"),
    ("between tokens", "tbt_s"),
    ("latency", "latency_s"),
    ("wait for first step", "wait_s"),
    ("program latency", "program_latency_s"),
    ("program, per token", "program_s_per_token"),
)


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Reports by name. Times in the unit that suits each; `-` where there is no figure."""
    runs = list(reports.values())
    rows = [("", *reports)]
    rows += [(name, *(cell(run) for run in runs)) for name, cell in _cells(runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{row[0]:<{widths[0]}}  "
        + "  ".join(f"{text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def time_text(seconds: float) -> str:
    """A duration in three digits or so."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.{1 if seconds < 0.1 else 0}f} ms"
    return f"{seconds:.{2 if seconds < 10 else 1 if seconds < 100 else 0}f} s"


Cell = Callable[[Mapping[str, Any]], str]


def _cells(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Cell]]:
    """Names of the rows that have something to say, and how to fill them."""
    yield "calls ended / arrived", lambda run: f"{run['calls_ended']:,} / {run['calls_arrived']:,}"
    if any(run["calls_refused"] for run in runs):
        yield "calls refused", lambda run: f"{run['calls_refused']:,}"
    yield "simulated", lambda run: time_text(run["end_s"])
    yield "calls/s", lambda run: f"{run['requests_per_s']:.2f}"
    yield "answer tokens/s", lambda run: f"{run['output_tokens_per_s']:,.0f}"
    yield "all tokens/s, cached too", lambda run: f"{run['tokens_per_s']:,.0f}"
    for title, key in _TIMES:
        if any(run.get(key) for run in runs):
            for index, level in enumerate(_SPREAD):
                yield f"{title if not index else '':<20} {level}", _time(key, level)
    if any("slo" in run for run in runs):
        yield "within the SLO", lambda run: f"{run['slo']['share']:.1%}"
        yield "goodput, calls/s", lambda run: f"{run['slo']['goodput_per_s']:.2f}"
    if any("deadlines" in run for run in runs):
        yield "deadlines kept", lambda run: f"{run['deadlines']['share']:.1%}"
    if any("fairness" in run for run in runs):
        yield "worst gap of service", lambda run: f"{run['fairness']['worst_gap']:,.0f}"
        yield "Jain's index", lambda run: f"{run['fairness']['jain']:.3f}"
    yield "prompt tokens cached", lambda run: f"{run['cached_share']:.1%}"
    yield "preemptions", lambda run: f"{run['preemptions']:,}"
    if any(run["swapped_bytes"] for run in runs):
        yield "swapped, each device", lambda run: f"{run['swapped_bytes'] / _GIB:.2f} GiB"
    if any(run["compile_stall_s"] for run in runs):
        yield "stalled by compiling", lambda run: time_text(run["compile_stall_s"])
    yield "padding", lambda run: f"{run['padding_share']:.1%}"
    yield "device busy", lambda run: f"{sum(run['utilisation']) / len(run['utilisation']):.1%}"
    yield "rows per step", lambda run: f"{run['rows_per_step']:.1f}"


def _time(key: str, level: str) -> Cell:
    return lambda run: time_text(run[key][level]) if run.get(key) else "-"
