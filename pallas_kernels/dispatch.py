"""Choosing a kernel implementation by refusal.

A backend raises `NotImplementedError("reason")` for what it cannot do. Without a name, the first backend that does
not refuse is taken; a backend asked for by name is never replaced in silence.
"""

from collections.abc import Callable, Mapping
from typing import Any

Implementation = Callable[..., Any]


def dispatch(
    op: str, implementations: Mapping[str, Implementation], impl: str | None, *args: Any, **options: Any
) -> Any:
    """Call `implementations[impl]`, or the first one that does not refuse.

    Raises:
      ValueError: `impl` names no implementation of this op.
      NotImplementedError: the implementation asked for by name refuses, with its reason.
      ExceptionGroup: every implementation refuses; holds all reasons.
    """
    if impl is not None:
        if impl not in implementations:
            raise ValueError(f"{op} has no implementation {impl!r}; there are: {', '.join(implementations)}")
        return implementations[impl](*args, **options)
    refusals: list[Exception] = []
    for name, implementation in implementations.items():
        try:
            return implementation(*args, **options)
        except NotImplementedError as refusal:
            refusals.append(NotImplementedError(f"{name}: {refusal}"))
    raise ExceptionGroup(f"no implementation of {op} takes this case", refusals)
