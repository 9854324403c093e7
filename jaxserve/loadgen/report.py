"""A load test in numbers, under the names that vLLM's benchmark gives them, and as a table."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.loadgen.arrivals import peak
from jaxserve.loadgen.client import Answer
from jaxserve.loadgen.run import Result

METRICS = {
    "ttft": "time to first token",
    "tpot": "time per token after it",
    "itl": "between chunks",
    "e2el": "whole answer",
    "client_queue_time": "sent late",
}
GOODPUT = ("ttft", "tpot", "e2el")
_BUSY = 0.8  # of a core: more than this and times may be the client's own


def report(
    result: Result, *, metrics: Sequence[str], percentiles: Sequence[float], goodput: Mapping[str, float]
) -> dict[str, Any]:
    """What JSON can hold. Times in milliseconds; `goodput`: limits by metric."""
    good = [answer for answer in result.answers.values() if not answer.error]
    bad = [answer for answer in result.answers.values() if answer.error]
    seconds = max(result.duration_s, 1e-9)
    num_input, num_output = sum(a.num_prompt for a in good), sum(a.num_output for a in good)
    chunks = sum(answer.num_chunks for answer in good)
    facts: dict[str, Any] = {
        "is_partial": result.is_partial,
        "duration": result.duration_s,
        "num_prompts": result.num_calls,
        "completed": len(good),
        "failed": len(bad),
        "unsent": result.num_unsent,
        "unfinished": result.num_calls - len(result.answers) - result.num_unsent,
        "errors_by_kind": dict(Counter(answer.error for answer in bad).most_common()),
        "error_examples": {answer.error: answer.error_text for answer in reversed(bad)},
        "finish_reasons": dict(Counter(str(answer.finish_reason) for answer in good).most_common()),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / seconds,
        "output_throughput": num_output / seconds,
        "total_token_throughput": (num_input + num_output) / seconds,
        "max_concurrent_requests": peak([(a.sent_s, a.last_s) for a in result.answers.values()]),
        "tokens_per_chunk": num_output / chunks if chunks else None,
        "answers_without_usage": sum(not answer.has_usage for answer in good),
        "client_cpu_share": result.cpu_s / seconds,
    }
    if goodput:
        kept = sum(_keeps(answer, goodput) for answer in good)
        facts |= {"goodput": dict(goodput), "good_completed": kept, "request_goodput": kept / seconds}
    for name in metrics:
        facts |= _spread(name, _values(name, good), percentiles)
    return facts


def details(result: Result) -> dict[str, Any]:
    """Per request, in the order of the calls; seconds."""
    answers = list(result.answers.values())
    return {
        "input_lens": [answer.num_prompt for answer in answers],
        "output_lens": [answer.num_output for answer in answers],
        "start_times": [answer.sent_s - result.start_s for answer in answers],
        "ttfts": [answer.ttft_s for answer in answers],
        "itls": [answer.gaps for answer in answers],
        "latencies": [answer.e2e_s for answer in answers],
        "queue_times": [answer.queued_s for answer in answers],
        "generated_texts": [answer.text for answer in answers],
        "errors": [f"{answer.error}: {answer.error_text}" if answer.error else "" for answer in answers],
    }


def read_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """`ttft:500 tpot:50` -> limits in milliseconds.

    Raises:
      ConfigError: another metric, or no such limit.
    """
    limits = dict[str, float]()
    for pair in pairs:
        name, _, text = pair.partition(":")
        try:
            limits[name] = float(text)
        except ValueError:
            limits[name] = -1
        if name not in GOODPUT or not limits[name] >= 0:
            raise ConfigError(f"--goodput {pair} must be like ttft:500, in ms; there are {', '.join(GOODPUT)}")
    return limits


def table(facts: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """Figures as lines, then a row of milliseconds for each metric."""
    lines = [
        ("requests completed", f"{facts['completed']:,} of {facts['num_prompts']:,}"),
        *((f"  failed: {kind}", f"{count:,}") for kind, count in facts["errors_by_kind"].items()),
        *(
            (text, f"{facts[key]:,}")
            for key, text in (("unsent", "  not sent"), ("unfinished", "  cut off"))
            if facts[key]
        ),
        ("duration", f"{facts['duration']:,.2f} s"),
        ("prompt tokens", f"{facts['total_input_tokens']:,}"),
        ("answer tokens", f"{facts['total_output_tokens']:,}"),
        ("requests/s", f"{facts['request_throughput']:,.2f}"),
        ("answer tokens/s", f"{facts['output_throughput']:,.1f}"),
        ("all tokens/s", f"{facts['total_token_throughput']:,.1f}"),
        ("most requests at once", f"{facts['max_concurrent_requests']:,}"),
    ]
    if "goodput" in facts:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in facts["goodput"].items())
        lines.append((f"goodput, requests/s ({limits})", f"{facts['request_goodput']:,.2f}"))
    if facts["tokens_per_chunk"] is not None and not 0.99 < facts["tokens_per_chunk"] < 1.01:
        lines.append(("tokens per chunk", f"{facts['tokens_per_chunk']:.2f}"))
    wide = max(len(name) for name, _ in lines)
    text = "\n".join(f"{name:<{wide}}  {value:>14}" for name, value in lines)
    return "\n".join((text, "", *_rows(facts, metrics), *_notes(facts)))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of sorted values, as numpy's default."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _keeps(answer: Answer, limits: Mapping[str, float]) -> bool:
    values = {"ttft": answer.ttft_s, "tpot": answer.tpot_s or 0.0, "e2el": answer.e2e_s}
    return all(1000 * values[name] <= limit for name, limit in limits.items())


def _values(name: str, answers: Iterable[Answer]) -> list[float]:
    """Milliseconds."""
    match name:
        case "ttft":
            found = [answer.ttft_s for answer in answers]
        case "tpot":
            found = [value for answer in answers if (value := answer.tpot_s) is not None]
        case "itl":
            found = [gap for answer in answers for gap in answer.gaps]
        case "e2el":
            found = [answer.e2e_s for answer in answers]
        case _:
            found = [answer.queued_s for answer in answers]
    return [1000 * value for value in found]


def _spread(name: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """Nothing where there are no values."""
    if not values:
        return {}
    ordered = sorted(values)
    facts = {
        f"mean_{name}_ms": statistics.fmean(ordered),
        f"median_{name}_ms": percentile(ordered, 50),
        f"std_{name}_ms": statistics.pstdev(ordered),
    }
    return facts | {f"p{percent:g}_{name}_ms": percentile(ordered, percent) for percent in percentiles}


def _rows(facts: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    known = [name for name in metrics if f"mean_{name}_ms" in facts]
    if not known:
        return []
    kinds = [key.partition("_")[0] for key in facts if key.endswith(f"_{known[0]}_ms") and not key.startswith("std")]
    wide = max(len(METRICS[name]) for name in known)
    rows = [f"{'ms':<{wide}}" + "".join(f"{kind:>11}" for kind in kinds)]
    for name in known:
        cells = "".join(f"{facts[f'{kind}_{name}_ms']:>11,.2f}" for kind in kinds)
        rows.append(f"{METRICS[name]:<{wide}}{cells}")
    return rows


def _notes(facts: Mapping[str, Any]) -> list[str]:
    notes = [f"{kind}: {text}" for kind, text in facts["error_examples"].items() if text]
    if facts["answers_without_usage"]:
        notes.append(
            f"{facts['answers_without_usage']:,} answers came without usage: their tokens are counted here, by the"
            " tokenizer or else by chunks."
        )
    if facts["client_cpu_share"] > _BUSY:
        notes.append(
            f"This client was busy for {facts['client_cpu_share']:.0%} of the time: what it measured is in part itself."
        )
    return ["", *notes] if notes else []
