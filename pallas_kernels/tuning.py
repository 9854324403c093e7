"""Block sizes found by `scripts/tune_kernels.py`, looked up by chip; where there are none, a rule decides.

A kernel's `tuned.py` holds the rules, as functions of the shapes that matter: their arguments are the shape class. Its
`tuned.json` holds the exceptions:

    {"TPU v5 lite": {"chunk(token_bytes=4096, is_decode=True)": {"choice": 1024, "gain": 1.08, ...}}}
"""

import contextlib
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax

from jaxserve.pallas_kernels.platform import compute_capability

P = ParamSpec("P")
T = TypeVar("T")


class Asked(NamedTuple):
    """A question that was put to a table."""

    choice: Any  # what was answered
    is_by_rule: bool


class Table:
    """A decorator for rules: the decorated function answers from the file, and else calls the rule."""

    def __init__(self, path: Path):
        self._path = path
        self._tried: Mapping[str, Any] = {}
        self.asked: dict[tuple[str, str], Asked] = {}  # (chip, question) -> the last answer

    @functools.cached_property
    def entries(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Chip -> question -> what was found; empty without a file."""
        return json.loads(self._path.read_text()) if self._path.exists() else {}

    def __call__(self, rule: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(rule)

        @functools.wraps(rule)
        def choose(*args: P.args, **options: P.kwargs) -> T:
            bound = signature.bind(*args, **options).arguments
            question = f"{rule.__name__}({', '.join(f'{name}={value}' for name, value in bound.items())})"
            found = self._tried.get(question)
            if found is None:
                found = self.entries.get(chip(), {}).get(question, {}).get("choice")
            answer = rule(*args, **options) if found is None else _as(signature.return_annotation, found)
            self.asked[chip(), question] = Asked(answer, found is None)
            return answer

        return choose

    @contextlib.contextmanager
    def trying(self, choices: Mapping[str, Any]) -> Iterator[None]:
        """Answer some questions so for a while, on any chip. For tuning."""
        before, self._tried = self._tried, choices
        try:
            yield
        finally:
            self._tried = before


def chip() -> str:
    """What a program is compiled for: a TPU's kind ("TPU v5 lite"), a GPU's compute capability ("sm_90"), "cpu"."""
    if capability := compute_capability():
        return f"sm_{capability.replace('.', '')}"
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind


def _as(annotation: Any, found: Any) -> Any:
    """As the rule answers: JSON has no tuples, and a search changes plain ones."""
    if not isinstance(found, list | tuple):
        return found
    return annotation._make(found) if hasattr(annotation, "_make") else tuple(found)
