"""Llama 4 and Llama 3.2: calls as a Python list, `[f(a=1), g(b="x")]`, which is the whole answer.

Arguments are handed out when their call ends, not as they come: Python's way to write a value must be turned into JSON.
"""

import ast
import json
import warnings
from typing import Any

from jaxserve.openai.tools.call import NotACall, find, spaces
from jaxserve.openai.tools.parser import Rules, Sink

OPEN, CLOSE = "<|python_start|>", "<|python_end|>"
_CLOSER = {"(": ")", "[": "]", "{": "}"}
_JSON_WORDS = {"true": True, "false": False, "null": None}


def rules(sink: Sink) -> Rules[None]:
    """A list at the very beginning; what does not begin like one is text."""
    char = yield
    try:
        char = yield from spaces(char)
        if char == "<":
            tag = yield from _exactly(OPEN, char)
            char = yield from spaces(tag)
        if char != "[":
            raise NotACall(char)
        while char != "]":
            char = yield from spaces((yield))
            char = yield from _call(sink, char)
            char = yield from spaces(char)
            if char not in (",", "]"):
                raise NotACall(char)
        sink.drop()
        char = yield
        if (yield from find(sink, (CLOSE,), char)):
            sink.drop()
    except NotACall as fault:
        sink.text(keep=len(fault.char))
    while True:
        sink.text()
        yield


def _exactly(tag: str, char: str) -> Rules[str]:
    for wanted in tag:
        if char != wanted:
            raise NotACall(char)
        char = yield
    return char


def _call(sink: Sink, char: str) -> Rules[str]:
    """`name(key=value, ...)`; returns the character after it."""
    raw, closers, quote, is_escaped = list[str](), list[str](), "", False
    name = ""
    while char.isalnum() or (char and char in "_.-"):
        name += char
        char = yield
    if not name or char != "(":
        raise NotACall(char)
    while char:
        raw.append(char)
        if quote:
            quote, is_escaped = quote if is_escaped or char != quote else "", char == "\\" and not is_escaped
        elif char in ("'", '"'):
            quote = char
        elif char in _CLOSER:
            closers.append(_CLOSER[char])
        elif char in _CLOSER.values() and closers.pop() != char:
            raise NotACall(char)
        if not closers:
            break
        char = yield
    try:
        arguments = _arguments("f" + "".join(raw))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise NotACall(char) from None
    sink.drop()
    sink.start(name)
    sink.arguments(arguments)
    return (yield)


def _arguments(source: str) -> str:
    """`f(a=1, b=[True])` -> `{"a": 1, "b": [true]}`.

    Raises:
      SyntaxError, ValueError, TypeError, RecursionError, MemoryError: it is anything but keywords with plain values.
    """
    with warnings.catch_warnings(action="ignore"):  # of "\d" and the like, which would be printed
        node = ast.parse(source, mode="eval").body
    if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name):
        raise ValueError("only keyword arguments have names")
    values = {_key(keyword.arg): _value(keyword.value) for keyword in node.keywords}
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    text.encode()  # half of a surrogate pair is no text
    return text


def _key(name: str | None) -> str:
    if name is None:
        raise ValueError("** has no name")
    return name


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=word) if word in _JSON_WORDS:
            return _JSON_WORDS[word]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {ast.literal_eval(key or ""): _value(value) for key, value in zip(keys, values, strict=True)}
        case _:
            return ast.literal_eval(node)
