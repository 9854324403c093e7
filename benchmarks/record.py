"""Appends benchmark results as JSON lines: numbers, spread, versions, command, machine. Never a host name or a path."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
# Instruction sets that decide how fast a CPU multiplies matrices.
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "bf16",
    "i8mm",
    "sve",
)


def _proc_lines(path: str) -> list[tuple[str, str]]:
    """`key: value` lines of a file in /proc; empty where there is no /proc."""
    try:
        text = Path(path).read_text()
    except OSError:
        return []
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return [(key.strip(), value.strip()) for key, value in pairs]


def machine() -> dict[str, Any]:
    """The machine in words: processor, cores this process may use, memory, instruction sets."""
    cpu = dict(_proc_lines("/proc/cpuinfo"))
    memory_kib = dict(_proc_lines("/proc/meminfo")).get("MemTotal", "0 kB").split()[0]
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "family_model": "/".join(filter(None, (cpu.get("cpu family"), cpu.get("model")))),
        "cores": cores,
        "memory_gib": round(int(memory_kib) / 2**20),
        "features": [name for name in FEATURES if name in flags],
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def commit() -> str:
    """Short hash of the checked-out commit, with "+" if tracked files differ from it; "unknown" outside git."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command() -> str:
    """The command line, with every path outside the repository replaced by its last part."""
    words = [Path(word).name if word.startswith(("/", "~")) else word for word in sys.argv[1:]]
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(REPOSITORY) if script.is_relative_to(REPOSITORY) else script.name
    return " ".join(["python", str(name), *words])


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, 10th and 90th percentile (linear between samples) and their number."""
    ordered = sorted(values)

    def percentile(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    numbers = {"median": statistics.median(ordered), "p10": percentile(0.1), "p90": percentile(0.9)}
    return {name: float(f"{value:.5g}") for name, value in numbers.items()} | {"n": len(ordered)}


def append(path: Path, case: dict[str, Any], metric: str, unit: str, values: Sequence[float], **more: Any) -> None:
    """Appends one line to `path`.

    Args:
        path: a .jsonl file; its folder must exist.
        case: what was measured (engine, dtype, row, ...).
        metric: name of the number; `unit`: its unit.
        values: one number per repeat.
        more: versions, mode, ratios and the like.
    """
    append_line(path, {**case, "metric": metric, "unit": unit, **spread(values), **more, "machine": machine()})


def append_line(path: Path, facts: dict[str, Any]) -> None:
    """Appends one line to `path`: date, commit, `facts`, command."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    line = {"date": now, "commit": commit(), **facts, "command": command()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
