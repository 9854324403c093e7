"""What a grammar makes a model write, the parser reads as calls: schemas and rules agree."""

import json
import random

import pytest
from llguidance import LLMatcher, LLTokenizer

from jaxserve.openai.tools.forced import OneCall, rules
from jaxserve.openai.tools.parser import CallStart
from jaxserve.openai.tools.schema import any_of, moved, parameters
from tests.openai.tools.cuts import check_cuts, put_together

WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"place": {"$ref": "#/$defs/Place"}, "days": {"type": "integer"}},
        "required": ["place"],
        "additionalProperties": False,
        "$defs": {"Place": {"enum": ["Rome", "Oslo"]}},
    },
}
# The same name for a definition of its own: they must not meet.
TRAVEL = {
    "name": "travel",
    "parameters": {
        "type": "object",
        "properties": {"to": {"$ref": "#/$defs/Place"}},
        "required": ["to"],
        "$defs": {"Place": {"const": "Mars"}},
    },
}
NOTHING = {"name": "nothing"}
SPACE = 32


def accepts(schema: dict[str, object], text: str) -> bool:
    """Whether the grammar of a schema allows exactly this text."""
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_json_schema(schema), log_level=0)
    return all(matcher.consume_token(byte) for byte in text.encode()) and matcher.is_accepting()


def wander(schema: dict[str, object], rng: random.Random) -> str:
    """A random text that the grammar of a schema allows."""
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_json_schema(schema), log_level=0)
    written = bytearray()
    while not matcher.is_stopped() and not (matcher.is_accepting() and rng.random() < 0.5):
        allowed = [byte for byte, bias in enumerate(matcher.compute_logit_bias()[:256]) if bias]
        byte = rng.choice([b for b in allowed if b > SPACE] or allowed)
        assert matcher.consume_token(byte)
        written.append(byte)
        assert len(written) < 5_000
    return written.decode()


@pytest.mark.parametrize("seed", range(12))
def test_what_the_grammar_allows_is_read_as_calls(seed: int) -> None:
    rng = random.Random(seed)
    answer = check_cuts(rules, wander(any_of([WEATHER, TRAVEL, NOTHING]), rng), rng)
    assert answer.calls
    assert not answer.text
    for name, arguments in answer.calls:
        function = {"weather": WEATHER, "travel": TRAVEL, "nothing": NOTHING}[name]
        assert accepts(parameters(function), arguments)


def test_each_function_has_its_own_definitions() -> None:
    schema = any_of([WEATHER, TRAVEL, NOTHING])
    assert accepts(schema, '[{"name":"weather","parameters":{"place":"Rome"}},{"name":"nothing","parameters":{}}]')
    assert accepts(schema, '[{"name":"travel","parameters":{"to":"Mars"}}]')
    assert not accepts(schema, '[{"name":"travel","parameters":{"to":"Rome"}}]')
    assert not accepts(schema, '[{"name":"other","parameters":{}}]')
    assert not accepts(schema, "[]")


def test_one_at_a_time() -> None:
    call = '{"name":"nothing","parameters":{}}'
    assert accepts(any_of([NOTHING]), f"[{call},{call}]")
    assert not accepts(any_of([NOTHING], parallel=False), f"[{call},{call}]")


def test_only_references_move() -> None:
    schema = {"$ref": "#", "a": [{"$ref": "#/$defs/X"}], "const": {"$ref": "#"}, "b": {"$ref": "http://x/#/y"}}
    assert moved(schema, "#/p") == {
        "$ref": "#/p",
        "a": [{"$ref": "#/p/$defs/X"}],
        "const": {"$ref": "#"},
        "b": {"$ref": "http://x/#/y"},
    }


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ('[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}]\n', "", ["f", "g"]),
        ('[{"name": "f", "parameters": {"a": ', "", ["f"]),
        ('[{"name": "f"', '[{"name": "f"', []),
        ("no list", "no list", []),
        ("", "", []),
    ],
)
def test_what_was_cut_short_is_not_lost(text: str, said: str, calls: list[str]) -> None:
    answer = check_cuts(rules, text, random.Random(0))
    assert (answer.text, [name for name, _ in answer.calls]) == (said, calls)


def test_a_named_function_has_the_text_as_arguments() -> None:
    reader = OneCall("f")
    pieces = [piece for text in ("", '{"a"', ": 1}") for piece in reader.push(text)] + reader.finish()
    assert put_together(pieces).calls == [("f", json.dumps({"a": 1}))]
    assert sum(isinstance(piece, CallStart) for piece in pieces) == 1
    assert OneCall("f").finish() == []
