#!/usr/bin/env python3
"""Finds block sizes of attention that are better than the rules of `tuned.py`, by chip and by what the rules are asked.

    python scripts/tune_kernels.py                                  # on a TPU or GPU: by timing
    python scripts/tune_kernels.py --chips v5e,v6e                  # anywhere: by the TPU compiler's schedule
    python scripts/tune_kernels.py --models llama-3-8b --write      # keeps what is found in tuned.json

From what the rule says, one number after the other is made larger and smaller, as long as that gains at least --least
(3 %) on the mean of several lengths, and loses no more than that at any of them. What gains nothing stays with the rule.

By timing: loops of calls on the device, medians of five. By schedule: see `scripts/tuning/schedule.py` for
what is estimated, and from what. An estimate is no measurement, and each entry says which of the two it is.
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / "scripts"), str(_ROOT / "benchmarks"), str(_ROOT)]  # this checkout, whatever is installed

import record  # noqa: E402
from tuning import climb, schedule, timing  # noqa: E402

COMMON = ["llama-3-8b", "llama-3-70b-tp8", "llama-3.2-1b"]


def main(argv: list[str] | None = None) -> int:
    words = lambda text: text.split(",")  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=words, help="TPUs to compile for; default: time on this machine's device")
    parser.add_argument("--models", type=words, default=COMMON, help="names in ragged_paged_attention/cases.py")
    parser.add_argument("--calls", type=words, default=list(schedule.CALLS), help=f"of {','.join(schedule.CALLS)}")
    parser.add_argument("--backend", help="by timing: which one; default: the first that runs there")
    parser.add_argument("--least", type=float, default=0.03, help="gain below which the rule stays (default: 0.03)")
    parser.add_argument("--write", action="store_true", help="put what is found into tuned.json")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        schedule.compile_one(*args.one[:3], json.loads(args.one[3]))
        return 0
    if args.chips:
        judges = [(call, schedule.judge(__file__, chip, model, call)) for chip, model, call in _product(args)]
    else:
        judges = [(call, timing.judge(model, call, args.backend)) for _, model, call in _product(args)]
    found, known = [], {}
    for call, judge in judges:
        for entry in climb.search(judge, least=args.least, known=known):
            found.append({"call": call, **entry})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    print(climb.table(found))
    if args.write:
        _write([entry for entry in found if entry["gain"] >= args.least])
    return 0


def _product(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    return [(chip, model, call) for chip in args.chips or [""] for model in args.models for call in args.calls]


def _write(found: list[dict[str, Any]]) -> None:
    """Into the file that `tuned.py` reads; entries of other chips and questions stay."""
    from jaxserve.pallas_kernels.ragged_paged_attention import tuned

    path = Path(tuned.__file__).with_name("tuned.json")
    entries = json.loads(path.read_text()) if path.exists() else {}
    for entry in found:
        about = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "command": record.command(), "commit": record.commit()}
        facts = {name: entry[name] for name in ("choice", "rule", "gain", "speedups", "by", "versions")}
        entries.setdefault(entry["chip"], {})[entry["question"]] = facts | about
    ordered = {chip: dict(sorted(questions.items())) for chip, questions in sorted(entries.items())}
    path.write_text(json.dumps(ordered, indent=2) + "\n")
    print(f"{len(found)} written to {path.relative_to(_ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
