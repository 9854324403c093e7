"""Prints how large the code is: the ten longest files and functions, and the host engine as a whole.

python scripts/print_sizes.py
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("jaxserve", "models", "sharding", "pallas_kernels", "scripts")
HOST_ENGINE = ("engine", "scheduler", "kv", "executor")


def python_files(folder: Path) -> list[Path]:
    """Python files below `folder`, links to other folders not followed (os.walk would count them twice)."""
    return sorted(path for path in folder.rglob("*.py") if not any(part.is_symlink() for part in path.parents))


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """(lines, name) of each function of a file, decorators and docstring included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (
                (node.end_lineno or node.lineno) - node.lineno + 1,
                f"{path.relative_to(ROOT)}:{node.lineno} {node.name}",
            )


def host_engine_lines() -> dict[str, int]:
    """Lines of jaxserve/{engine,scheduler,kv,executor}, each a file or a folder."""
    sizes = {}
    for name in HOST_ENGINE:
        paths = [ROOT / "jaxserve" / f"{name}.py", *python_files(ROOT / "jaxserve" / name)]
        sizes[name] = sum(num_lines(path) for path in paths if path.exists())
    return sizes


def print_table(title: str, rows: list[tuple[int, str]]) -> None:
    print(f"\n{title}")
    for lines, name in sorted(rows, reverse=True)[:10]:
        print(f"{lines:7,}  {name}")


def main() -> int:
    files = [path for folder in FOLDERS for path in python_files(ROOT / folder)]
    lengths = [(num_lines(path), str(path.relative_to(ROOT))) for path in files]
    print_table("longest files (aim 100 to 250 lines, stop at 400)", lengths)
    print_table("longest functions (stop at 60)", [row for path in files for row in functions(path)])
    sizes = host_engine_lines()
    print("\nhost engine")
    for name, lines in sizes.items():
        print(f"{lines:7,}  jaxserve/{name}")
    print(f"{sum(sizes.values()):7,}  together (kept under about 1,800)")
    print(f"{sum(num_lines(path) for path in files):7,}  all of {', '.join(FOLDERS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
