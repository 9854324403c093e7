#!/usr/bin/env python3
"""What compilers make of our kernels, without the chips: a table of the schedule of each, per chip and model shape.

    python scripts/kernel_report.py                                    # prints a Markdown table
    python scripts/kernel_report.py --chips v5e,v6e --models llama-3-8b
    python scripts/kernel_report.py --chips h100                       # Hopper: needs pip install -e '.[gpu]', no GPU
    python scripts/kernel_report.py --chips sm_80,sm_89                # by Triton: needs pip install -e '.[triton]'
    python scripts/kernel_report.py --chips v5e --against HEAD~3       # what changed since a commit
    python scripts/kernel_report.py --write docs/kernels.md            # the document, and lines of JSON for the record

TPUs need `pip install libtpu`, or TPU_LIBRARY_PATH. docs/kernels.md says what the columns mean.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks"), str(ROOT)]  # this checkout, whatever is installed

import record  # noqa: E402
from kernels import document, hopper, tpu, triton_gpus  # noqa: E402

from jaxserve.pallas_kernels.ragged_paged_attention import cases  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "kernels.jsonl"
NOISE = {"compile s": 3.0}  # the compilers themselves always make the same
SECTIONS = {
    "TPU": tpu,
    "Hopper": hopper,
    "NVIDIA GPUs, Triton": triton_gpus,
}  # of the document: chips that one compiler knows


def lines_for(section: Any, chips: list[str], models: list[str], kernels: list[str]) -> list[dict[str, Any]]:
    """The lines asked for; each is also written to stderr as JSON, which `--against` reads."""
    found = []
    for chip in (chip for chip in chips if chip in section.CHIPS):
        for model in models:
            for name, call in section.CALLS.items():
                if not set(kernels) & set(call.kernels):
                    continue
                for line in section.lines(__file__, chip, model, name):
                    if line["kernel"] in kernels:
                        found.append(line)
                        print(json.dumps(line), file=sys.stderr, flush=True)
    return found


def lines_of(commit: str, options: list[str]) -> list[dict[str, Any]]:
    """What the report of another commit says, run in a checkout of it."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        if subprocess.run([*git, "add", "--quiet", "--detach", tree, commit], check=False).returncode:
            raise SystemExit(f"{commit} cannot be checked out")
        try:
            done = subprocess.run(
                [sys.executable, "scripts/kernel_report.py", *options],
                cwd=tree,
                env=os.environ | {"PYTHONPATH": str(tree)},
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)
    if done.returncode:
        raise SystemExit(f"the report of {commit} fails: {done.stderr.strip().splitlines()[-1]}")
    return [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]


def write_section(path: Path, title: str, lines: list[dict[str, Any]]) -> None:
    versions = SECTIONS[title].versions()
    made = f"Made by `{record.command()}` at {record.commit()}; {', '.join(f'{k} {v}' for k, v in versions.items())}."
    document.put_section(path, title, f"{made}\n\n{SECTIONS[title].ABOUT}\n{document.table(lines)}")
    for line in lines:
        record.append_line(RESULTS, {**line, **versions})


def main(argv: list[str] | None = None) -> int:
    words = lambda text: text.split(",")  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=words, default=list(tpu.CHIPS))
    parser.add_argument(
        "--models", type=words, default=list(tpu.MODELS), help="names in ragged_paged_attention/cases.py"
    )
    parser.add_argument(
        "--kernels", type=words, default=[name for section in SECTIONS.values() for name in section.KERNELS]
    )
    parser.add_argument(
        "--against", metavar="COMMIT", help="print what differs from the report of a commit, not the table"
    )
    parser.add_argument("--write", type=Path, help="a Markdown file, whose sections about these chips are replaced")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    known = {chip: section for section in SECTIONS.values() for chip in section.CHIPS}
    if args.one:
        known[args.one[0]].compile_one(*args.one)
        return 0
    if unknown := set(args.chips) - set(known):
        parser.error(f"no such chip: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if unknown := set(args.models) - set(cases.MODELS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(cases.MODELS)}")
    by_title = {title: lines_for(section, args.chips, args.models, args.kernels) for title, section in SECTIONS.items()}
    by_title = {title: lines for title, lines in by_title.items() if lines}
    if args.against:
        options = [f"--{name}={','.join(getattr(args, name))}" for name in ("chips", "models", "kernels")]
        lines = [line for lines in by_title.values() for line in lines]
        differences = document.changes(lines_of(args.against, options), lines, NOISE)
        print(document.table(differences) if differences else f"nothing differs from {args.against}")
    for title, lines in by_title.items():
        if not args.against:
            print(document.table(lines))
        if args.write:
            write_section(args.write, title, lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
