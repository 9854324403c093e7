#!/usr/bin/env python3
"""What the TPU compiler makes of the whole step on slices of several chips, without the chips: memory and collectives.

    python scripts/slice_report.py                                  # prints a Markdown table; minutes for each line
    python scripts/slice_report.py --slices v5e-4 --models llama-3.1-8b --steps decode
    python scripts/slice_report.py --write docs/slices.md           # lines of JSON for the record, and the document of all

Needs `pip install libtpu`, or TPU_LIBRARY_PATH. Fails if a step does not fit, copies its pool, or hands on an array of
the size of a weight. docs/slices.md says what the columns mean.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks"), str(ROOT)]  # this checkout, whatever is installed

import record  # noqa: E402
from kernels import document  # noqa: E402
from slices import report  # noqa: E402
from slices.cases import CASES  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "slices.jsonl"
TITLE = "# Slices, as the TPU compiler sees them"


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append to the record, and make the document of the newest line of each step there."""
    versions = report.versions()
    for line in lines:
        record.append_line(RESULTS, {**line, **versions})
    newest = {}
    for text in RESULTS.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        newest[line["slice"], line["model"], line["step"]] = line
    shown = [
        newest[key] for case in CASES for rung in report.RUNGS if (key := (case.slice, case.model, rung)) in newest
    ]
    made = sorted({f"at {line['commit']}, jax {line['jax']}, libtpu {line['libtpu']}" for line in shown})
    about = f"Made by `scripts/slice_report.py`; do not edit. Compiled {'; '.join(made)}."
    table = document.table([{name: line[name] for name in lines[0]} for line in shown])
    path.write_text(f"{TITLE}\n\n{about}\n\n{report.ABOUT}\n{table}\n")


def main(argv: list[str] | None = None) -> int:
    words = lambda text: text.split(",")  # noqa: E731
    known = {
        "slices": list(dict.fromkeys(case.slice for case in CASES)),
        "models": list(dict.fromkeys(case.model for case in CASES)),
        "steps": list(report.RUNGS),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, values in known.items():
        parser.add_argument(f"--{name}", type=words, default=values, help=", ".join(values))
    parser.add_argument(
        "--write", type=Path, help="a Markdown file, made of the newest lines of all steps in the record"
    )
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        report.compile_one(*args.one)
        return 0
    for name, values in known.items():
        if unknown := set(getattr(args, name)) - set(values):
            parser.error(f"--{name}: no such {name[:-1]}: {', '.join(sorted(unknown))}; there are {', '.join(values)}")
    lines = []
    for case in CASES:
        for rung in args.steps if case.slice in args.slices and case.model in args.models else ():
            lines.append(report.line(__file__, case, rung))
            print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    if not lines:
        parser.error("none of these models is compiled for any of these slices")
    print(document.table(lines))
    if args.write:
        write(args.write, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
