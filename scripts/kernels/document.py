"""The Markdown file about kernels: sections that are made one by one, each by the machine that has the compiler for it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

TITLE = (
    "# Kernels, as their compilers see them\n\nMade by `scripts/kernel_report.py`, section by section; do not edit.\n"
)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown; the columns of the first line, words to the left, numbers to the right."""
    rows = [list(lines[0]), ["---" if isinstance(value, str) else "--:" for value in lines[0].values()]]
    rows += [["-" if value is None else value for value in line.values()] for line in lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def put_section(path: Path, title: str, body: str) -> None:
    """Write a section, in the place of the one of that title if there is one; leave all others as they are."""
    head, *sections = (path.read_text() if path.exists() else TITLE).split("\n## ")
    bodies = dict(section.split("\n", 1) for section in sections)
    bodies[title] = f"\n{body.strip()}\n"
    path.write_text("\n## ".join([head, *(f"{name}\n{text}" for name, text in bodies.items())]))


def changes(
    before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]], noise: Mapping[str, float]
) -> list[dict[str, Any]]:
    """What differs between two reports: a line for each kernel, chip, model and column, with both values.

    The words of a line say which it is; numbers are compared where both reports have the column. `noise` is the largest
    difference of a column that does not count; none where it has no entry.
    """

    def by_words(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[tuple[str, str], ...], Mapping[str, Any]]:
        return {tuple((k, v) for k, v in line.items() if isinstance(v, str)): line for line in lines}

    old, new = by_words(before), by_words(after)
    found = []
    for words in old.keys() ^ new.keys():
        only = ("there", "gone") if words in old else ("none", "new")
        found.append({**dict(words), "column": "the line", "before": only[0], "after": only[1]})
    for words, line in new.items():
        was = old.get(words, {})
        for name, value in line.items():
            is_number = isinstance(value, int | float) and isinstance(was.get(name), int | float)
            if is_number and abs(value - was[name]) > noise.get(name, 0):
                found.append({**dict(words), "column": name, "before": str(was[name]), "after": str(value)})
    return found
