"""Hermes and Qwen calls: what is a call, what stays text, and how early each is handed out."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.openai.tools.hermes import rules
from jaxserve.openai.tools.parser import Arguments, CallStart, Text
from tests.openai.tools.cuts import check_cuts, parser, put_together, whole

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "}</tool_call>"]}}\n</tool_call>'
ARGUMENTS = '{"a": [1, "}</tool_call>"]}'
FRAGMENTS = (
    *("<tool_call>", "</tool_call>", "<tool_", "</tool_call", "<", "\n", " ", "é", "text"),
    *('{"name": "f", "arguments": ', '{"name": "g"', ', "parameters": ', '{"arguments": {"b": 2}, ', '"name": "h"'),
    *(
        '{"a": 1}',
        "{}",
        "}",
        "}}",
        "]",
        "[1, 2",
        '"',
        "\\",
        '\\"',
        ",",
        ":",
        "null",
        '"{\\"c\\": 3}"',
        "1e5",
        '"\\ud800"',
    ),
)
NAMES = st.text("abc_xyz", min_size=1, max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.tuples(NAMES, st.dictionaries(st.text(max_size=6), VALUES, max_size=3)), max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_calls_come_out_as_they_were_written(calls: list[tuple[str, dict[str, object]]], data: st.DataObject) -> None:
    indent = data.draw(st.sampled_from([None, 0, 2]))
    ascii_only = data.draw(st.booleans())
    before, after = data.draw(st.sampled_from(["", "Let me see.\n"])), data.draw(st.sampled_from(["", "\n", "So."]))
    written = [json.dumps(arguments, indent=indent, ensure_ascii=ascii_only) for _, arguments in calls]
    text = before
    for (name, _), arguments in zip(calls, written, strict=True):
        text += f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n</tool_call>\n'
    answer = check_cuts(rules, text + after, random.Random(data.draw(st.integers(0, 99))))
    assert answer.calls == [(name, arguments) for (name, _), arguments in zip(calls, written, strict=True)]
    assert answer.text.split() == (before + after).split()


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_whatever_a_model_writes_the_cuts_do_not_matter_and_nothing_is_lost(fragments: list[str], seed: int) -> None:
    answer = check_cuts(rules, "".join(fragments), random.Random(seed))
    if not answer.calls:
        assert answer.text == "".join(fragments)
    for name, _ in answer.calls:
        name.encode()


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("", "", []),
        ("plain < text", "plain < text", []),
        (CALL, "", [("f", ARGUMENTS)]),
        (f"Well.\n{CALL}\n{CALL}\n", "Well.\n", [("f", ARGUMENTS)] * 2),
        (f"a{CALL} b {CALL}c", "a b c", [("f", ARGUMENTS)] * 2),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"id": 7, "name": "f", "parameters": { }}</tool_call>', "", [("f", "{ }")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}\n</tool', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}}</tool_call> b', "} b", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {"a": "un', "", [("f", '{"a": "un')]),
        ('<tool_call>{"name": "f", "arguments": {"a": ]}}</tool_call>', "]}}</tool_call>", [("f", '{"a": ')]),
    ],
)
def test_what_is_a_call(text: str, said: str, calls: list[tuple[str, str]]) -> None:
    answer = check_cuts(rules, text, random.Random(0))
    assert (answer.text, answer.calls) == (said, calls)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>f(1)</tool_call>",
        '<tool_call>{"name": "f", "argu',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "no object"}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        '<tool_call>{"name" "f"}</tool_call>',
        "</tool_call> \n",
        "  \n",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    answer = check_cuts(rules, text, random.Random(0))
    assert (answer.text, answer.calls) == (text, [])


def test_a_call_after_a_broken_one_is_found() -> None:
    answer = whole(rules, f"<tool_call><tool_call>{{}}</tool_call>{CALL}")
    assert answer.text == "<tool_call><tool_call>{}</tool_call>"
    assert answer.calls == [("f", ARGUMENTS)]


def test_the_order_of_text_and_calls_is_kept() -> None:
    assert whole(rules, f"a{CALL}b{CALL}").order == ["a", 0, "b", 1]


def test_pieces_come_as_early_as_they_are_certain() -> None:
    reader = parser(rules)
    assert reader.push("Hi <") == [Text("Hi ")]
    assert reader.push("b") == [Text("<b")]
    assert reader.push('<tool_call>{"name": "f", "arguments": ') == []
    begun = reader.push('{"a": "x')
    assert isinstance(begun[0], CallStart)
    assert begun[1:] == [Arguments(0, '{"a": "x')]
    assert reader.push("y") == [Arguments(0, "y")]
    assert reader.push('z"}}') == [Arguments(0, 'z"}')]
    assert reader.finish() == []


def test_ids_are_of_their_own() -> None:
    pieces = parser(rules).push(CALL * 20)
    ids = [piece.id for piece in pieces if isinstance(piece, CallStart)]
    assert len(set(ids)) == 20
    assert all(name.startswith("call_") for name in ids)


def test_long_and_deep_texts_take_linear_time() -> None:
    """Each of these is quadratic where held text is scanned again; at this length that takes many seconds."""
    for text in (
        "<tool_call>" + '{"arguments": ' + '{"a":' * 10_000,
        " " * 60_000,
        "<tool_call>" * 10_000,
        '<tool_call>{"name": "f", "arguments": ' + "[" * 60_000,
    ):
        assert put_together([*(reader := parser(rules)).push(text), *reader.finish()]).text
