"""Measure an exported `tiny` folder: bits per byte, exact accuracy per task and length, ablation of layers.

    python scripts/eval_tiny.py jaxserve/assets/tiny --json docs/tiny/eval.json

Questions come from seeds, and filler text from library files, that training does not see. Exact means that every
token of the answer is the most likely one. The ablation lets one layer attend to a random tenth of the positions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tiny import chat, evaluate, tasks
from tiny.export import load
from tiny.tokenizer import split_text, stdlib_files


def table(result: dict) -> str:
    """The result as Markdown tables."""
    lengths = [str(n) for n in evaluate.LENGTHS]
    lines = [f"held-out bits per byte: {result['bits_per_byte']:.3f}", "", "| task | " + " | ".join(lengths) + " |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for task, cells in result["accuracy"].items():
        shown = [f"{100 * cells[n]['exact']:.1f} %" if n in cells else "" for n in lengths]
        lines.append(f"| {task} | " + " | ".join(shown) + " |")
    names = list(next(iter(result["ablation"].values())))
    lines += ["", "| random attention in | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for task, cells in result["ablation"].items():
        lines.append(f"| {task} | " + " | ".join(f"{100 * cells[n]:.1f} %" for n in names) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--scale", type=int, default=1, help="multiply the number of test rows")
    args = parser.parse_args()
    params, cfg, tok = load(args.folder)
    files = stdlib_files()
    _, held_out = split_text(files)
    lex = tasks.make_lexicon(tok, held_out, chat.CANNED + chat.module_questions(files))
    result = evaluate.evaluate(params, cfg, tok, lex, held_out, args.scale)
    print(table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
