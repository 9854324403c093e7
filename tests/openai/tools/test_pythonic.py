"""Calls in a Python list: turned into JSON, or left as they are."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.openai.tools.pythonic import rules
from tests.openai.tools.cuts import check_cuts

FRAGMENTS = (
    *(
        "[",
        "]",
        "f(",
        "g()",
        ")",
        "a=1",
        "b='x)'",
        'c="',
        ", ",
        "{",
        "}",
        "'k': ",
        "None",
        "true",
        "-1",
        "**",
        "\\",
        "\n",
    ),
    *("<|python_start|>", "<|python_end|>", "text", "(", "'"),
)
LISTS = {"a": [1, [2, None]], "b": {"k": True}, "c": False}


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12), st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_whatever_a_model_writes_the_cuts_do_not_matter_and_nothing_is_lost(fragments: list[str], seed: int) -> None:
    answer = check_cuts(rules, "".join(fragments), random.Random(seed))
    if not answer.calls:
        assert answer.text == "".join(fragments)
    for _, arguments in answer.calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("""[f(a=1, b="x, )", c='é'), g()]""", "", [("f", {"a": 1, "b": "x, )", "c": "é"}), ("g", {})]),
        ("<|python_start|>[f(a=-1.5)]<|python_end|>", "", [("f", {"a": -1.5})]),
        (" [f(a=[1, (2, None)], b={'k': True}, c=false)] So.", " So.", [("f", LISTS)]),
        ("[ns.f(a='it\\'s'), oops", ", oops", [("ns.f", {"a": "it's"})]),
    ],
)
def test_what_is_a_call(text: str, said: str, calls: list[tuple[str, object]]) -> None:
    answer = check_cuts(rules, text, random.Random(0))
    assert (answer.text, [(name, json.loads(given)) for name, given in answer.calls]) == (said, calls)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "[1] says so",
        "[]",
        "[f(1)]",
        "[f(**{'a': 1})]",
        "[f(a=open('x'))]",
        "[f(a=1e999)]",
        "[f(a=1j)]",
        "[f(a='\\ud800')]",
        "[f(a=",
        "[(a=1)]",
        "I would call [f(a=1)]",
        "[f(a=" + "-" * 50_000 + "1)]",
        "[f(a=" + "[" * 5_000 + "]" * 5_000 + ")]",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    answer = check_cuts(rules, text, random.Random(0), times=1)
    assert (answer.text, answer.calls) == (text, [])
