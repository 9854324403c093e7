"""Answers of a given form through the bundled model, which could do none of this by itself: calls that must be made,
and JSON that must be right."""

import json
from typing import Literal

import openai
import pydantic
import pytest

MESSAGES = [{"role": "user", "content": "def add(a, b):"}]
ASKED = {"model": "tiny", "messages": MESSAGES, "max_tokens": 400, "temperature": 1.0, "seed": 3}
WEATHER = {
    "type": "object",
    "properties": {"place": {"$ref": "#/$defs/Place"}, "warm": {"type": "boolean"}},
    "required": ["place", "warm"],
    "additionalProperties": False,
    "$defs": {"Place": {"enum": ["Rome", "Oslo"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "nothing"}},
]


class Weather(pydantic.BaseModel):
    """What must come out."""

    model_config = pydantic.ConfigDict(extra="forbid")

    place: Literal["Rome", "Oslo"]
    warm: bool


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def calls_of(chunks):
    """The calls of a stream, as clients put them together."""
    calls = {}
    for chunk in chunks:
        for call in chunk.choices[0].delta.tool_calls or ():
            name, arguments = calls.get(call.index, ("", ""))
            calls[call.index] = (name + (call.function.name or ""), arguments + (call.function.arguments or ""))
    return list(calls.values())


def check_call(name, arguments):
    if name == "weather":
        Weather.model_validate_json(arguments)
    else:
        assert (name, json.loads(arguments)) == ("nothing", {})


@pytest.mark.parametrize("seed", [1, 2])
def test_a_required_call_is_made(client, seed):
    asked = ASKED | {"seed": seed, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    check_call(call.function.name, call.function.arguments)
    assert calls_of(client.chat.completions.create(**asked, stream=True)) == [
        (call.function.name, call.function.arguments)
    ]


def test_a_named_function_is_called(client):
    choice = {"type": "function", "function": {"name": "weather"}}
    asked = ASKED | {"tools": TOOLS, "tool_choice": choice}
    answer = client.chat.completions.create(**asked).choices[0]
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather"
    check_call(call.function.name, call.function.arguments)
    assert answer.finish_reason == "stop"  # as OpenAI has it, where the model had no choice
    assert calls_of(client.chat.completions.create(**asked, stream=True)) == [("weather", call.function.arguments)]


def test_a_call_that_is_cut_short_is_what_there_is_of_it(client):
    asked = ASKED | {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    answer = client.chat.completions.create(**asked | {"max_tokens": 4}).choices[0]
    assert answer.finish_reason == "length"
    assert answer.message.tool_calls[0].function.arguments.startswith("{")


def test_the_clients_own_parsing_of_a_form(client):
    answer = client.chat.completions.parse(**ASKED, response_format=Weather).choices[0]
    assert isinstance(answer.message.parsed, Weather)


def test_a_json_object(client):
    asked = ASKED | {"response_format": {"type": "json_object"}, "max_tokens": 1000, "temperature": 0.7}
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)


@pytest.mark.parametrize(
    "form",
    [
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"structured_outputs": {"regex": "yes|no"}},
        {"guided_choice": ["yes", "no"]},
        {"guided_regex": "(yes|no)"},
        {"guided_grammar": 'start: "yes" | "no"'},
        {"guided_json": {"enum": ["yes", "no"]}},
    ],
)
def test_vllms_forms(client, form):
    answer = client.chat.completions.create(**ASKED, extra_body=form).choices[0]
    assert answer.message.content.strip('"') in ("yes", "no")


@pytest.mark.parametrize("schema", [{"type": "no such type"}, {"$ref": "#/$defs/none"}, {"not": {}}])
def test_a_schema_that_cannot_be_followed_is_told_with_its_field(client, schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="response_format") as caught:
        client.chat.completions.create(**ASKED, response_format=form)
    assert caught.value.param == "response_format"
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": schema}, "required": ["a"]}}}
    ]
    with pytest.raises(openai.BadRequestError, match="tools") as caught:
        client.chat.completions.create(**ASKED, tools=tools, tool_choice="required")
    assert caught.value.param == "tools"


def test_responses_make_calls_and_keep_to_forms(client):
    asked = {"model": "tiny", "input": "def add(a, b):", "max_output_tokens": 400, "extra_body": {"seed": 3}}
    tools = [{"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}]
    forced = client.responses.create(**asked, tools=tools, tool_choice={"type": "function", "name": "weather"})
    (call,) = forced.output
    assert (forced.status, call.type) == ("completed", "function_call")
    check_call(call.name, call.arguments)
    required = client.responses.create(**asked, tools=tools, tool_choice="required", parallel_tool_calls=False)
    check_call(required.output[0].name, required.output[0].arguments)
    assert isinstance(client.responses.parse(**asked, text_format=Weather).output_parsed, Weather)
