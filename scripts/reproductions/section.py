"""One comparison with a paper: what is run, what came of it, and its part of docs/reproductions.md.

A file NAME.py beside this one is a reproduction if it has `run(options) -> Section`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kernels.document import table

TITLE = """# Reproductions

What papers claim of their schedulers, and what the same rules do in our simulator. Made by `scripts/reproduce.py`, section
by section; do not edit between the marks.
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to run."""

    pictures: Path  # folder for pictures
    quick: bool = False  # a small version, to see that it runs; its numbers mean nothing
    seeds: int = 1  # workloads that differ only by their seed
    trace: Path | None = None  # a trace file of the caller's
    say: Callable[[str], None] = print  # progress

    @property
    def seeds_text(self) -> str:
        """For texts."""
        return "one seed" if self.seeds == 1 else f"means of {self.seeds} seeds"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Lines with the same columns, and what they show."""

    caption: str
    lines: Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """What a reproduction found. Texts are Markdown."""

    title: str
    claim: str  # of the paper, with its source
    setup: str  # ours: workload, model, chip, baselines
    tables: Sequence[Table]
    verdict: str
    pictures: Mapping[str, str] = dataclasses.field(default_factory=dict)  # file in the folder -> what it shows


def body(section: Section, command: str, folder: str) -> str:
    """The section as Markdown. `folder`: of the pictures, as seen from the document."""
    parts = [
        f"## {section.title}",
        f"**Claim.** {section.claim}",
        f"**Set-up.** {section.setup} Made by `{command}`.",
        *(f"{each.caption}\n\n{table([dict(line) for line in each.lines])}" for each in section.tables),
        *(f"![{text}]({folder}/{file})" for file, text in section.pictures.items()),
        f"**Verdict.** {section.verdict}",
    ]
    return "\n\n".join(part.strip() for part in parts)


def put(path: Path, name: str, text: str) -> None:
    """Write what stands between the marks of `name`, and leave all else as it is. New marks come in order of names."""
    whole = path.read_text(encoding="utf-8") if path.exists() else TITLE
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    part = f"{begin}\n{text.strip()}\n{end}"
    if begin in whole:
        before, rest = whole.split(begin, 1)
        _, after = rest.split(end, 1)
        path.write_text(before + part + after, encoding="utf-8")
        return
    names = [line[5:-4] for line in whole.splitlines() if line.startswith("<!-- ") and " of " not in line]
    later = next((each for each in sorted(names) if each > name), None)
    mark = f"<!-- {later} -->" if later else ""
    before, after = whole.split(mark, 1) if mark else (whole.rstrip() + "\n\n", "")
    path.write_text(before + part + ("\n\n" + mark + after if mark else "\n"), encoding="utf-8")
