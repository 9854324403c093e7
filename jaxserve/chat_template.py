"""Chat templates: Jinja programs that come with a model, and are therefore not trusted.

They run in Jinja's immutable sandbox (no attribute tricks, no writes), without loaders, and under a budget of executed
lines and of produced text, so a template that loops or multiplies strings ends in an error instead of a hang.
"""

import datetime
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from jaxserve.errors import CheckpointError, RequestError

_MAX_LINES = 2_000_000  # executed template lines; a long conversation needs some thousands
_MAX_TEXT = 16_000_000  # characters
_MAX_OPERAND = 1_000_000  # length or size of what a template may multiply or format


class _BudgetError(Exception):
    """The template used more than it may."""


def render(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """Render a conversation to prompt text.

    Raises:
      CheckpointError: the template is not valid Jinja, or does what it must not.
      RequestError: the template itself refuses these messages (`raise_exception`).
    """
    import jinja2  # 60 ms; only chats need it
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        """Refuses operators that could allocate without bound."""

        intercepted_binops = frozenset(["*", "**", "%", "+"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    for name in ("center", "indent", "format", "wordwrap", "xmlattr"):  # take a width from the template
        environment.filters.pop(name, None)
    environment.globals = {
        "range": environment.globals["range"],
        "namespace": environment.globals["namespace"],
        "dict": dict,
        "raise_exception": _refuse,
        "strftime_now": lambda style: datetime.datetime.now().strftime(str(style)[:100]),
    }
    try:
        compiled = environment.from_string(template)
        return _bounded(lambda: _join(compiled.generate(messages=[dict(m) for m in messages], **variables)))
    except RequestError:
        raise
    except _BudgetError as error:
        raise CheckpointError(f"the model's chat template was stopped: {error}") from None
    except SecurityError as error:
        raise CheckpointError(f"the model's chat template does what it must not: {error}") from None
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, OverflowError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"the model's chat template failed: {type(error).__name__}: {error}") from None


def _join(chunks: Any) -> str:
    parts, size = [], 0
    for chunk in chunks:
        size += len(chunk)
        if size > _MAX_TEXT:
            raise _BudgetError(f"it produced more than {_MAX_TEXT} characters")
        parts.append(chunk)
    return "".join(parts)


def _bounded(work: Callable[[], str]) -> str:
    """Run `work`, counting the lines it executes in this thread."""
    lines = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += 1
        if lines > _MAX_LINES:
            raise _BudgetError(f"it executed more than {_MAX_LINES} lines")
        return trace

    before = sys.gettrace()
    if before is not None:  # a debugger or coverage is at work: do not take its place
        return work()
    sys.settrace(trace)
    try:
        return work()
    finally:
        sys.settrace(None)


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "**":
        too_big = isinstance(right, (int, float)) and abs(right) > 64
    elif operator == "*":
        sizes = [len(x) if isinstance(x, (str, bytes, list, tuple)) else abs(x) for x in (left, right) if _sized(x)]
        is_repeat = any(isinstance(x, (str, bytes, list, tuple)) for x in (left, right))
        too_big = is_repeat and len(sizes) == 2 and sizes[0] * sizes[1] > _MAX_OPERAND
    elif operator == "%":
        too_big = isinstance(left, str)  # printf widths
    else:
        too_big = isinstance(left, (list, tuple, str)) and len(left) > _MAX_TEXT
    if too_big:
        raise _BudgetError(f"operator {operator!r} would make too large a value")


def _sized(value: Any) -> bool:
    return isinstance(value, (str, bytes, list, tuple, int, float)) and not isinstance(value, bool)


def _refuse(message: Any) -> None:
    raise RequestError(f"the model's chat template refuses these messages: {message}")


def _tojson(value: Any, indent: int | None = None, **_ignored: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=None if indent is None else min(int(indent), 8))
