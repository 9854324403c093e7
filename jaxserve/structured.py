"""What an answer must look like: a JSON schema, a regular expression, one of some texts, a grammar.

Checked when it is made; compiled by `sampling/grammar.py`. Whoever steers an answer token by token is a `Guide`: the
scheduler and the engine know no more of grammars than this.
"""

import dataclasses
import json as json_text
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from jaxserve.config import names_unknown_options, reject_unknown
from jaxserve.errors import ConfigError

MAX_BYTES = 1 << 18  # of a schema, an expression, all choices together, or a grammar
MAX_DEPTH = 64  # objects and lists inside of each other in a JSON schema
KINDS = ("json", "regex", "choice", "grammar", "json_object")


@names_unknown_options
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """Exactly one of the first five; vLLM's names.

    Regular expressions are those of Rust's `regex`: no look-around, no back-references, and the whole answer must match. A
    grammar is in Lark's syntax (it has a rule `start`) or in GBNF's (a rule `root`). The last two options are for JSON.
    """

    json: Any = None  # a JSON schema: a mapping, or its text; kept as text
    regex: str | None = None
    choice: Any = None  # a list of texts; kept as a tuple
    grammar: str | None = None
    json_object: bool | None = None  # any JSON object
    disable_any_whitespace: bool = False  # JSON without blanks and line breaks between its parts
    whitespace_pattern: str | None = None  # a regular expression: what may stand between the parts of JSON

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            what = " and ".join(given) if given else "nothing"
            raise ConfigError(f"structured_outputs says {what}", remedy=f"Give exactly one of {', '.join(KINDS)}")
        (kind,) = given
        for name in ("json_object", "disable_any_whitespace"):
            if getattr(self, name) not in (None, True, False):
                raise ConfigError(f"structured_outputs.{name}={getattr(self, name)!r:.40} must be True or False")
        if kind == "json":
            object.__setattr__(self, "json", _schema(self.json))
        elif kind == "choice":
            object.__setattr__(self, "choice", _choices(self.choice))
        elif kind != "json_object":
            _check_text(kind, getattr(self, kind))
        if kind not in ("json", "json_object") and (self.disable_any_whitespace or self.whitespace_pattern is not None):
            raise ConfigError(f"disable_any_whitespace and whitespace_pattern are for JSON, not for {kind}")
        if self.whitespace_pattern is not None:
            _check_text("whitespace_pattern", self.whitespace_pattern)
            if self.disable_any_whitespace:
                raise ConfigError("disable_any_whitespace and whitespace_pattern contradict each other")

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(kind for kind in KINDS if getattr(self, kind) not in (None, False))


class Guide(Protocol):
    """Steers one answer. Only the engine's thread calls it."""

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete, and nothing but its end may follow."""
        ...

    @property
    def error(self) -> str:
        """Why it cannot go on; empty if it can."""
        ...

    def mask(self) -> bytes:
        """Which tokens may come next: bit i % 8 of byte i // 8 is token i. Never all of them 0. Costs nothing twice."""
        ...

    def advance(self, token_id: int) -> None:
        """A token was chosen."""
        ...


class Grammar(Protocol):
    """A compiled `StructuredOutputsParams`."""

    def start(self) -> Guide:
        """A guide for one more answer."""
        ...


def structured_outputs(value: Any) -> StructuredOutputsParams | None:
    """What users give, checked.

    Raises:
      ConfigError: it says nothing, or two things, or what it says cannot be a schema, an expression, ...
    """
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"structured_outputs must be an object, not {value!r:.80}")
    names = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
    reject_unknown(value, names, what="option of structured_outputs")
    return StructuredOutputsParams(**value)


def _schema(value: Any) -> str:
    """A JSON schema as text."""
    try:
        text = value if isinstance(value, str) else json_text.dumps(value, ensure_ascii=False, allow_nan=False)
        _check_text("json", text)
        schema = json_text.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"structured_outputs.json is no JSON schema: {error or 'it is nested too deeply'}") from None
    if not isinstance(schema, dict):
        raise ConfigError(f"structured_outputs.json must be a JSON schema (an object), not {schema!r:.60}")
    if _depth(schema) > MAX_DEPTH:
        raise ConfigError(f"structured_outputs.json is nested more than {MAX_DEPTH} levels deep")
    return text


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [value for value in level if isinstance(value, dict | list)]:
        depth += 1
        level = [part for value in level for part in (value.values() if isinstance(value, dict) else value)]
    return depth


def _choices(value: Any) -> tuple[str, ...]:
    choices = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else ()
    if not choices or not all(isinstance(choice, str) for choice in choices):
        raise ConfigError(f"structured_outputs.choice must be a list of texts, not {value!r:.60}")
    if not any(choices):
        raise ConfigError("structured_outputs.choice has no choice but the empty text")
    _check_text("choice", "".join(choices))
    return choices


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"structured_outputs.{name} must be a text that is not empty, not {value!r:.60}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ConfigError(f"structured_outputs.{name} holds a lone surrogate, so it is no text") from None
    if size > MAX_BYTES:
        raise ConfigError(f"structured_outputs.{name} has {size} bytes; at most {MAX_BYTES} are supported")
