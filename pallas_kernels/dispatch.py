"""Choosing a kernel implementation by refusal.

A backend raises `NotImplementedError("reason")` for what it cannot do. Without a name, the first backend that does
not refuse is taken; a backend asked for by name is never replaced in silence.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.pallas_kernels.platform import target_platform

Implementation = Callable[..., Any]


def tried(
    implementations: Mapping[str, Implementation], order: Mapping[str, Sequence[str]], impl: str | None
) -> dict[str, Implementation]:
    """What `dispatch` looks at: those of the platform that is traced for, in its order; all if one is asked for by name."""
    names = implementations if impl is not None else order[target_platform()]
    return {name: implementations[name] for name in names}


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
