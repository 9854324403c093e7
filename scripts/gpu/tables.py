"""What the checks found, as tables and lines."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from scripts.gpu.children import Result


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """The first row is the head; its words and those of the first column stand to the left."""
    if len(rows) < 2:
        return ""
    rule = ["---", *["--:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [rows[0], rule, *rows[1:]])


def of_cases(results: Sequence[Result]) -> str:
    """A line per backend: how many cases passed, were refused and failed, and the largest errors by dtype."""
    rows: list[list[Any]] = [["backend", "passed", "refused", "failed", "largest error", "of lse"]]
    for name in dict.fromkeys(result.name for result in results if result.name):
        mine = [result for result in results if result.name == name]
        states = Counter(result.state for result in mine)
        rows.append([name, *(states[state] for state in ("passed", "refused", "failed"))])
        rows[-1] += [_largest(mine, "error"), _largest(mine, "lse_error")]
    return markdown(rows)


def of_kernels(results: Sequence[Result], backends: Sequence[str]) -> str:
    """A line per scenario and backend of ours: time, rate, share of what the device can do, and how many times faster than
    each peer it was."""
    by_item: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        if result.numbers.get("seconds"):
            by_item.setdefault(result.item, {})[result.name] = result.numbers
    peers = list(dict.fromkeys(name for found in by_item.values() for name in found if name not in backends))
    rows: list[list[Any]] = [["scenario", "backend", "ms", "rate", "of the limit", *(f"over {peer}" for peer in peers)]]
    for item, found in by_item.items():
        for name in [name for name in found if name in backends] or ["-"]:
            numbers = found.get(name)
            if numbers is None:
                rows.append([item, *["-"] * (len(rows[0]) - 1)])
                continue
            is_decode = numbers["kind"] == "decode"
            rate = f"{numbers['gb_per_s']:.0f} GB/s" if is_decode else f"{numbers['tflops']:.0f} TFLOP/s"
            share = "in cache" if numbers["share"] is None else f"{numbers['share']:.0%}"
            times = [f"{found[peer]['ms'] / numbers['ms']:.2f}x" if peer in found else "-" for peer in peers]
            rows.append([item, name, f"{numbers['ms']:.3f}", rate, share, *times])
    return markdown(rows)


def of_engine(results: Sequence[Result]) -> str:
    """A line per check, then the figures of the measurement."""
    rows: list[list[Any]] = [["check", "backend", "", "figures"]]
    for result in results:
        numbers = {name: value for name, value in result.numbers.items() if name.endswith("_per_s") or "_ms_" in name}
        figures = ", ".join(f"{name} {value:.1f}" for name, value in numbers.items())
        rows.append([result.item, result.name, result.state, figures or result.text])
    return markdown(rows)


def reasons(results: Iterable[Result]) -> str:
    """Why something did not run or was wrong: equal reasons once, with the first items that have them."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for result in results:
        if result.state in ("refused", "failed", "skipped"):
            grouped.setdefault((result.state, result.name, result.text), []).append(result.item)
    lines = []
    for (state, name, text), items in sorted(grouped.items(), key=lambda pair: pair[0][0] != "failed"):
        more = f" and {len(items) - 3} more" if len(items) > 3 else ""
        lines.append(f"{state}: {name + ': ' if name else ''}{text} ({', '.join(items[:3])}{more})")
    return "\n".join(lines)


def _largest(results: Iterable[Result], number: str) -> str:
    by_dtype: dict[str, float] = {}
    for result in results:
        if number in result.numbers:
            dtype = result.numbers["dtype"]
            by_dtype[dtype] = max(by_dtype.get(dtype, 0.0), result.numbers[number])
    return ", ".join(f"{dtype} {value:.1e}" for dtype, value in by_dtype.items()) or "-"
