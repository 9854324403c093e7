"""A call written as a JSON object, `{"name": "f", "arguments": {...}}`, read character by character.

Rules here take the character that was read last, and return the one after what they have read.
"""

import json
from collections.abc import Callable, Collection, Sequence

from jaxserve.openai.tools.parser import Rules, Sink

SPACES = frozenset(" \t\n\r")
ARGUMENTS = ("arguments", "parameters")
_CLOSER = {"{": "}", "[": "]"}


class NotACall(Exception):  # noqa: N818  news, not a mistake
    """What was read is no call. `char` is the character that tells, the first of what follows; "" is the end."""

    def __init__(self, char: str):
        super().__init__(char)
        self.char = char


def spaces(char: str) -> Rules[str]:
    """Read over spaces."""
    while char in SPACES:
        char = yield
    return char


def find(sink: Sink, tags: Sequence[str], char: str) -> Rules[str]:
    """Hand out text up to the first of `tags`. Returns it, or "" at the end of the text.

    It is held, and what was held before `char` as well, if no text came between.
    """
    firsts = {tag[0] for tag in tags}
    begun = ""  # a beginning of a tag, at the end of what is held
    lead = len(sink.held) - 1
    while char:
        if begun or char in firsts:
            begun += char
            tag = max(tags, key=lambda tag: _overlap(begun, tag))
            begun = tag[: _overlap(begun, tag)]
            if begun == tag:
                return tag
        if len(sink.held) > len(begun) + lead:
            sink.text(keep=len(begun))
            lead = 0
        char = yield
    return ""


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of `text` that are the beginning of `tag`."""
    return next((size for size in range(min(len(tag), len(text)), 0, -1) if text.endswith(tag[:size])), 0)


def call(sink: Sink, char: str, *, keys: Collection[str] = ARGUMENTS, bare: bool = False) -> Rules[str]:
    """Read a call. It begins as soon as its name is known and its arguments have begun.

    With `bare` a call may have no arguments, or null.

    Raises:
      NotACall: with all but `char` still held, unless the call has begun: then what was wrong, and what follows.
    """
    name, arguments, has_begun = "", None, False
    if char != "{":
        raise NotACall(char)
    char = yield from spaces((yield))
    while char != "}":
        key, char = yield from _string(char)
        char = yield from spaces(char)
        if char != ":":
            raise NotACall(char)
        char = yield from spaces((yield))
        if key in keys and char == "{" and name and not has_begun:
            sink.drop(keep=1)
            sink.start(name)
            has_begun = True
            yield from _nested(char, sink.arguments)
            char = yield
        else:
            raw, char = yield from _value(char)
            if not has_begun and key == "name":
                name = _name(raw, char)
            elif not has_begun and key in keys:
                arguments = _arguments(raw, char, bare)
            if name and arguments and not has_begun:
                sink.drop(keep=len(char))
                sink.start(name)
                sink.arguments(arguments)
                has_begun = True
        char = yield from spaces(char)
        if char == ",":
            char = yield from spaces((yield))
        elif char != "}":
            raise NotACall(char)
    if not has_begun:
        if not (bare and name):
            raise NotACall(char)
        sink.start(name)
        sink.arguments("{}")
    sink.drop()
    return (yield)


def _name(raw: str, char: str) -> str:
    name = _loaded(raw, char)
    if not isinstance(name, str) or not name:
        raise NotACall(char)
    return name


def _arguments(raw: str, char: str, bare: bool) -> str:
    """The text of an object, which some models put into a string once more; "" for null where there may be none."""
    if bare and raw == "null":
        return ""
    text = _loaded(raw, char) if raw.startswith('"') else raw
    if not isinstance(text, str) or not isinstance(_loaded(text, char), dict):
        raise NotACall(char)
    return text


def _loaded(raw: str, char: str) -> object:
    try:
        value = json.loads(raw)
        if isinstance(value, str):
            value.encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError):  # a number of thousands of digits is a ValueError, too
        raise NotACall(char) from None
    return value


def _string(char: str) -> Rules[tuple[object, str]]:
    """A string in quotes, and the character after it."""
    if char != '"':
        raise NotACall(char)
    raw, char = yield from _value(char)
    return _loaded(raw, char), char


def _value(char: str) -> Rules[tuple[str, str]]:
    """Any JSON value as it is written, and the character after it."""
    if char in _CLOSER or char == '"':
        raw = yield from _nested(char)
        return raw, (yield)
    raw = ""
    while char.isalnum() or char in ("-", "+", "."):
        raw += char
        char = yield
    if not raw:
        raise NotACall(char)
    return raw, char


def _nested(char: str, each: Callable[[], None] = lambda: None) -> Rules[str]:
    """A string, an object or a list up to its end. `each` is called for each character that belongs to it.

    Only strings and brackets are understood: whether the rest is JSON is for the reader of arguments to say.
    """
    raw, closers, is_quoted, is_escaped = list[str](), list[str](), False, False
    while True:
        if is_quoted:
            is_quoted, is_escaped = is_escaped or char != '"', char == "\\" and not is_escaped
        elif char == '"':
            is_quoted = True
        elif char in _CLOSER:
            closers.append(_CLOSER[char])
        elif char in ("}", "]") and closers.pop() != char:
            raise NotACall(char)
        raw.append(char)
        each()
        if not closers and not is_quoted:
            return "".join(raw)
        char = yield
        if not char:
            raise NotACall(char)
