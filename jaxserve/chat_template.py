"""Chat templates: Jinja programs that come with a model, and are therefore not trusted.

They run in Jinja's immutable sandbox (no attribute tricks, no writes), without loaders, with the filters that chat
templates use, and under budgets: executed lines and seconds (counted by a trace function, so a single operation must be
short) and the size of everything an operation, a filter or a call produces (so it is).
"""

import datetime
import itertools
import json
import re
import string
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from jaxserve.errors import CheckpointError, RequestError

_MAX_LINES = 2_000_000  # executed template lines; a long conversation needs some thousands
_MAX_SECONDS = 4.0
_MAX_TEXT = 16_000_000  # characters of the prompt, or of one value
_MAX_MADE = 64_000_000  # characters of all values made on the way
_MAX_ITEMS = 100_000  # of one value, nested ones counted
_MAX_BITS = 4096  # of a whole number
_MAX_DIGITS = 99  # to round to
# Taken from Jinja as they are; `_environment` adds those of our own.
_FILTERS = """abs capitalize count d default dictsort e escape first float groupby int items last length list lower map
    max min reject rejectattr reverse safe select selectattr sort string title trim unique upper wordcount"""
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

    def indent(self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        """Jinja's `indent`, its result measured before it is made."""
        from jinja2.filters import do_indent

        size = len(width) if isinstance(width, str) else width
        self.check_size(len(str(text)) + (1 + len(str(text).splitlines())) * size)
        return do_indent(str(text), width, first, blank)

    def batch(self, values: Iterable[Any], linecount: int, fill_with: Any = None) -> Iterator[list[Any]]:
        """Jinja's `batch`, its rows measured one by one."""
        if linecount > _MAX_ITEMS:
            raise _BudgetError(f"it made rows of more than {_MAX_ITEMS} items")
        items = list(values)
        for begin in range(0, len(items), linecount):
            row = items[begin : begin + linecount]
            missing = linecount - len(row) if fill_with is not None else 0
            yield self.charge(row + [fill_with] * missing)

    def format(self, text: str, *args: Any, **kwargs: Any) -> str:
        """`str.format` with plain fields like `{}`, `{0}` or `{name:>8.2f}`, measured piece by piece."""
        parts, size, places = [], 0, itertools.count()
        for literal, field, spec, conversion in string.Formatter().parse(text):
            made = ""
            if field is not None:
                _check_field(field, spec or "", conversion)
                is_place = not field or field.isdecimal()
                value = args[int(field or next(places))] if is_place else kwargs[field]
                made = format(value, spec or "")
            parts += literal, made
            size += len(literal) + len(made)
            self.check_size(size)
        return "".join(parts)

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


def _sandbox(budget: _Budget) -> Any:
    """Jinja's environment, with every operator, literal, call and filter sent through the budget."""
    from jinja2.compiler import CodeGenerator  # 60 ms; only chats need it
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
        """Operators and calls."""

        intercepted_binops = frozenset(["*", "**", "%", "+"])
        code_generator_class = Generator
        charge = staticmethod(budget.charge)
        concat = staticmethod(budget.concat)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget.check_operands(operator, left, right)
            return budget.charge(super().call_binop(context, operator, left, right))

        def wrap_str_format(self, value: Any) -> Any:
            owner = getattr(value, "__self__", None)
            if isinstance(owner, str) and value.__name__ == "format":
                return lambda *args, **kwargs: budget.format(owner, *args, **kwargs)
            if isinstance(owner, str) and value.__name__ in _REFUSED_METHODS:
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

    return Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], optimized=False)


def _environment(budget: _Budget) -> Any:
    """The sandbox with what chat templates may use."""
    environment = _sandbox(budget)
    filters = {name: environment.filters[name] for name in _FILTERS.split()} | {
        "tojson": _tojson,
        "sum": _sum,
        "round": _round,
        "indent": budget.indent,
        "batch": budget.batch,
        "replace": budget.replace,
        "join": lambda values, d="", attribute=None: budget.join(d, _attributes(values, attribute)),
    }
    environment.filters = {name: _charging(budget, function) for name, function in filters.items()}
    environment.globals = {
        "range": environment.globals["range"],
        "namespace": environment.globals["namespace"],
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


def _check_field(field: str, spec: str, conversion: str | None) -> None:
    """Refuse fields of a format that reach into a value, take their spec from one, or pad to great width."""
    if not re.fullmatch(r"\w*", field) or "{" in spec or conversion:
        raise _BudgetError(f"it formats with a field that is not plain: {field!r:.40}")
    if re.search(r"\d{4}", spec):
        raise _BudgetError("it formats with more than 999 characters in a field")


def _sum(values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """Of numbers only: other values are added by copying, again and again."""
    return sum(map(_number, _attributes(values, attribute)), start=_number(start))


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    from jinja2.filters import do_round

    if abs(precision) > _MAX_DIGITS:
        raise _BudgetError(f"it rounds to more than {_MAX_DIGITS} digits")
    return do_round(_number(value), precision, method)  # pyright: ignore[reportArgumentType]  it checks the method


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise TypeError(f"{type(value).__name__} is not a number")
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise _BudgetError(f"it made a number of more than {_MAX_BITS} bits")
    return value


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
