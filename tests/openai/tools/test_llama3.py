"""Llama 3 calls: bare JSON objects, with or without the tag, one or several."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.openai.tools.llama3 import rules
from tests.openai.tools.cuts import check_cuts

F, G = '{"name": "f", "parameters": {"a": {"b": 1}}}', '{"name": "g", "arguments": {}}'
FRAGMENTS = (
    *("<|python_tag|>", "<|python", F, G, ";", "; ", " ", "text", "{", "}", '"', "\\", "[", "]", ":", ","),
    *('{"name": "h", ', '"parameters": ', "{}", '{"a": '),
)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12), st.integers(0, 99))
@settings(max_examples=300, deadline=None)
def test_whatever_a_model_writes_the_cuts_do_not_matter_and_nothing_is_lost(fragments: list[str], seed: int) -> None:
    answer = check_cuts(rules, "".join(fragments), random.Random(seed))
    if not answer.calls:
        assert answer.text == "".join(fragments)


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (F, "", [("f", '{"a": {"b": 1}}')]),
        (f"<|python_tag|>{F}", "", [("f", '{"a": {"b": 1}}')]),
        (f"{F}; {G}", "", [("f", '{"a": {"b": 1}}'), ("g", "{}")]),
        (f"{F}\n;{G};\n", "", [("f", '{"a": {"b": 1}}'), ("g", "{}")]),
        (f"I call <|python_tag|> {G} now", "I call  now", [("g", "{}")]),
        (f"{G}; and more", "; and more", [("g", "{}")]),
        (f"{{{G}", "{", [("g", "{}")]),
        ('{"name": "f", "parameters": {"a": "un', "", [("f", '{"a": "un')]),
    ],
)
def test_what_is_a_call(text: str, said: str, calls: list[tuple[str, str]]) -> None:
    answer = check_cuts(rules, text, random.Random(0))
    assert (answer.text, answer.calls) == (said, calls)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ada", "age": 36}',
        '{"name": "f"}',
        '{"name": "f", "parameters": null}',
        '<|python_tag|>brave_search.call(query="x")',
        '{"tool": {"name": "f", "parameters": {}}}',
        "{",
        "<|python_tag|>",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    answer = check_cuts(rules, text, random.Random(0))
    assert (answer.text, answer.calls) == (text, [])
