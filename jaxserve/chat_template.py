"""Chat templates: Jinja programs that come with a model, and are therefore not trusted.

They run in Jinja's immutable sandbox (no attribute tricks, no writes), without loaders, with the filters that chat
templates use, and under budgets: executed lines and seconds (counted by a trace function, so a single operation must be
short) and the size of everything an operation, a filter or a call produces (so it is).
"""

import datetime
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

from jaxserve.errors import CheckpointError, RequestError

_MAX_LINES = 2_000_000  # executed template lines; a long conversation needs some thousands
_MAX_SECONDS = 4.0
_MAX_TEXT = 16_000_000  # characters of the prompt, or of one value
_MAX_MADE = 64_000_000  # characters of all values made on the way
_MAX_ITEMS = 100_000  # of one value, nested ones counted
_MAX_BITS = 4096  # of a whole number
_FILTERS = """abs capitalize count d default dictsort e escape first float int items join last length list lower map max
    min reject rejectattr replace reverse safe select selectattr sort string title trim unique upper wordcount"""
_REFUSED_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate")


class _BudgetError(Exception):
    """The template used more than it may."""


class _Budget:
    """What one rendering has produced."""

    def __init__(self) -> None:
        self.made = 0

    def charge(self, value: Any) -> Any:
        """Measure a value just made, shared parts as often as they occur, and hand it back."""
        size, items, todo = 0, 0, [value]
        while todo:
            part = todo.pop()
            items += 1
            if isinstance(part, str | bytes):
                size += len(part)
            elif isinstance(part, Mapping):
                todo += part.keys()
                todo += part.values()
            elif isinstance(part, list | tuple | set | frozenset):
                todo += part
            if len(todo) + items > _MAX_ITEMS:
                raise _BudgetError(f"it made a value of more than {_MAX_ITEMS} items")
        self.check_size(size)
        self.made += size
        if self.made > _MAX_MADE:
            raise _BudgetError(f"it made more than {_MAX_MADE} characters on the way")
        return value

    def check_size(self, size: int) -> None:
        """Refuse a value that has, or is about to have, too many characters."""
        if size > _MAX_TEXT:
            raise _BudgetError(f"it produced more than {_MAX_TEXT} characters")

    def replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        """`str.replace`, its result measured before it is made."""
        text, old, new = str(text), str(old), str(new)
        self.check_size(len(text) + text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def join(self, separator: Any, values: Iterable[Any]) -> str:
        """`str.join`, its result measured before it is made."""
        parts = [str(value) for value in values]
        self.check_size(sum(map(len, parts)) + len(parts) * len(str(separator)))
        return str(separator).join(parts)

    def concat(self, chunks: Iterable[str]) -> str:
        """Text of a macro or a block."""
        parts = list(chunks)
        self.check_size(sum(map(len, parts)))
        return self.charge("".join(parts))

    def check_operands(self, operator: str, left: Any, right: Any) -> None:
        """Refuse an operation whose result would be too large."""
        numbers = [abs(x).bit_length() for x in (left, right) if isinstance(x, int)]
        repeated = [len(x) for x in (left, right) if isinstance(x, str | bytes | list | tuple)]
        too_big = False
        if operator == "%":
            too_big = bool(repeated)  # printf widths
        elif operator == "*" and repeated and numbers:
            too_big = max(repeated) * abs(left if isinstance(left, int) else right) > _MAX_TEXT // 16
        elif operator == "*" and len(numbers) == 2:
            too_big = sum(numbers) > _MAX_BITS
        elif operator == "**" and len(numbers) == 2:
            too_big = numbers[0] * abs(right) > _MAX_BITS
        elif operator == "+":
            too_big = sum(repeated) > _MAX_TEXT
        if too_big:
            raise _BudgetError(f"operator {operator!r} would make too large a value")


def render(template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """Render a conversation to prompt text.

    Raises:
      CheckpointError: the template is not valid Jinja, or does what it must not.
      RequestError: the template itself refuses these messages (`raise_exception`).
    """

    def work() -> str:
        compiled = _environment(_Budget()).from_string(template)
        return _join(compiled.generate(messages=[dict(m) for m in messages], **variables))

    try:
        return _bounded(work)
    except RequestError:
        raise
    except _BudgetError as error:
        raise CheckpointError(f"the model's chat template was stopped: {error}") from None
    except Exception as error:  # noqa: BLE001  a foreign program may raise anything
        what = f"{type(error).__name__}: {error!s:.200}"
        raise CheckpointError(f"the model's chat template failed or did what it must not: {what}") from None


def _environment(budget: _Budget) -> Any:
    import jinja2  # 60 ms; only chats need it
    from jinja2.compiler import CodeGenerator
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generator(CodeGenerator):
        """Sends what literals and `~` make through the budget."""

        def visit_List(self, node: Any, frame: Any) -> None:  # noqa: N802
            self._charged(super().visit_List, node, frame)

        def visit_Dict(self, node: Any, frame: Any) -> None:  # noqa: N802
            self._charged(super().visit_Dict, node, frame)

        def visit_Concat(self, node: Any, frame: Any) -> None:  # noqa: N802
            self._charged(super().visit_Concat, node, frame)

        def visit_Tuple(self, node: Any, frame: Any) -> None:  # noqa: N802
            if node.ctx == "load":
                self._charged(super().visit_Tuple, node, frame)
            else:
                super().visit_Tuple(node, frame)

        def _charged(self, visit: Callable[[Any, Any], None], node: Any, frame: Any) -> None:
            self.write("environment.charge(")
            visit(node, frame)
            self.write(")")

    class Environment(ImmutableSandboxedEnvironment):
        """Every operator, call and filter goes through the budget."""

        intercepted_binops = frozenset(["*", "**", "%", "+"])
        code_generator_class = Generator
        charge = staticmethod(budget.charge)
        concat = staticmethod(budget.concat)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget.check_operands(operator, left, right)
            return budget.charge(super().call_binop(context, operator, left, right))

        def wrap_str_format(self, value: Any) -> Any:
            if isinstance(getattr(value, "__self__", None), str) and value.__name__ in _REFUSED_METHODS:
                raise SecurityError(f"the method {value.__name__!r} is not available")
            return super().wrap_str_format(value)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  as in jinja2
            owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
            if isinstance(owner, str | bytes):
                if name in _REFUSED_METHODS:
                    raise SecurityError(f"the method {name!r} is not available")
                if name in ("replace", "join"):
                    return budget.charge(getattr(budget, name)(owner, *args, **kwargs))
            return budget.charge(super().call(__context, __obj, *args, **kwargs))

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], optimized=False
    )
    filters = {name: environment.filters[name] for name in _FILTERS.split()} | {
        "tojson": _tojson,
        "replace": budget.replace,
        "join": lambda values, d="", attribute=None: budget.join(d, _attributes(values, attribute)),
    }
    environment.filters = {name: _charging(budget, function) for name, function in filters.items()}
    environment.globals = {
        "range": environment.globals["range"],
        "namespace": jinja2.utils.Namespace,
        "dict": dict,
        "raise_exception": _refuse,
        "strftime_now": lambda style: datetime.datetime.now().strftime(str(style)[:100]),
    }
    return environment


def _charging(budget: _Budget, function: Callable[..., Any]) -> Callable[..., Any]:
    def charged(*args: Any, **kwargs: Any) -> Any:
        return budget.charge(function(*args, **kwargs))

    marker = getattr(function, "jinja_pass_arg", None)  # whether jinja passes its context or environment first
    if marker is not None:
        charged.jinja_pass_arg = marker  # pyright: ignore[reportFunctionMemberAccess]
    return charged


def _attributes(values: Iterable[Any], key: Any) -> Iterable[Any]:
    return values if key is None else [value[key] for value in values]


def _join(chunks: Any) -> str:
    parts, size = [], 0
    for chunk in chunks:
        size += len(chunk)
        if size > _MAX_TEXT:
            raise _BudgetError(f"it produced more than {_MAX_TEXT} characters")
        parts.append(chunk)
    return "".join(parts)


def _bounded(work: Callable[[], str]) -> str:
    """Run `work`, counting the lines it executes in this thread, and the seconds."""
    lines, end_s = 0, time.monotonic() + _MAX_SECONDS

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += 1
        if lines > _MAX_LINES:
            raise _BudgetError(f"it executed more than {_MAX_LINES} lines")
        if not lines % 64 and time.monotonic() > end_s:
            raise _BudgetError(f"it ran for more than {_MAX_SECONDS:g} s")
        return None if frame.f_code is measuring else trace

    measuring = _Budget.charge.__code__  # bounded by itself, and slow when traced
    before = sys.gettrace()
    if before is not None:  # a debugger or coverage is at work: do not take its place
        return work()
    sys.settrace(trace)
    try:
        return work()
    finally:
        sys.settrace(None)


def _refuse(message: Any) -> None:
    raise RequestError(f"the model's chat template refuses these messages: {message!s:.1000}")


def _tojson(value: Any, indent: int | None = None, **_ignored: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=None if indent is None else min(int(indent), 8))
