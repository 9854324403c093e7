#!/usr/bin/env python3
"""Papers' comparisons, run again in the simulator, with the policies of this repository.

    python scripts/reproduce.py                                # lists the names
    python scripts/reproduce.py plas                           # runs, and prints the section
    python scripts/reproduce.py plas atlas --seeds 3 --write docs/reproductions.md
    python scripts/reproduce.py plas --quick                   # a small version, to see that it runs

Minutes for each. With --write, pictures go into a folder beside the document that is called like it.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]  # this checkout, whatever is installed

from reproductions import section  # noqa: E402


def names() -> list[str]:
    """Every reproduction there is."""
    files = (ROOT / "scripts" / "reproductions").glob("[a-z]*.py")
    return sorted(file.stem for file in files if "def run(" in file.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}, or all")
    parser.add_argument("--write", type=Path, help="put the sections into this document")
    parser.add_argument("--seeds", type=int, default=1, help="workloads of each kind that differ by their seed")
    parser.add_argument("--trace", type=Path, help="a trace file, for those that replay one")
    parser.add_argument("--quick", action="store_true", help="a small version whose numbers mean nothing")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}: there must be at least one")
    if args.quick and args.write:
        parser.error("--quick is not for documents")
    wanted = names() if args.names == ["all"] else args.names
    if unknown := [name for name in wanted if name not in names()]:
        parser.error(f"there is no {unknown[0]!r}; known: {', '.join(names())}")
    if not wanted:
        print("\n".join(names()))
    folder = args.write.with_suffix("") if args.write else Path(tempfile.mkdtemp(prefix="reproductions-"))
    folder.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        options = section.Options(
            pictures=folder,
            quick=args.quick,
            seeds=args.seeds,
            trace=args.trace,
            say=lambda text: print(text, file=sys.stderr),
        )
        found = importlib.import_module(f"reproductions.{name}").run(options)
        words = ["python scripts/reproduce.py", name, f"--seeds {args.seeds}" if args.seeds > 1 else ""]
        words += ["--trace FILE" if args.trace else ""]
        text = section.body(found, " ".join(filter(None, words)), folder.name)
        if args.write:
            section.put(args.write, name, text)
        print(text if not args.write else f"{name}: written to {args.write}")


if __name__ == "__main__":
    main()
