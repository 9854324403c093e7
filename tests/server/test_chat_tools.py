"""Tool calls and thoughts through OpenAI's own client: a scripted model writes them, the client puts them together."""

import json
from pathlib import Path

import openai
import pytest

from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from jaxserve.tokenizer import Tokenizer, load_tokenizer
from tests.server.conftest import serving
from tests.server.scripted import ScriptedEngine

# The parts of Qwen's template that matter here.
TEMPLATE = """{%- if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}
{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.arguments.place }}</tool_call>{% endfor %}<|end|>
{%- if m.role == "odd" %}{{ 1 // 0 }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "How it is.", "parameters": {"type": "object", "properties": {}}},
}
ASKED = {"model": "it", "messages": [{"role": "user", "content": "Weather?"}], "tools": [TOOL]}
TWO = (
    "<think>Rome",
    " or Oslo?</th",
    "ink>Let me",
    " see.\n<tool",
    '_call>\n{"name": "wea',
    'ther", "argu',
    'ments": {"pl',
    'ace": "Ro',
    'me"}}\n</tool_c',
    'all>\n<tool_call>{"name": "weather", "arguments": {"place": "Oslo"}}</tool_call>',
)


@pytest.fixture(scope="module")
def engine():
    tokenizer = load_tokenizer(Path(__file__).parents[2] / "jaxserve" / "assets" / "tiny")
    assert tokenizer is not None
    return ScriptedEngine(Tokenizer(tokenizer._backend, chat_template=TEMPLATE, special_tokens={}))


@pytest.fixture(scope="module")
def client(engine):
    config = ServerConfig(reasoning_parser="qwen3")
    with (
        serving(create_app(config, ("it",), engine)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


def put_together(chunks):
    """The message of a stream, as clients put it together."""
    message = {"role": "", "content": "", "reasoning": "", "calls": {}}
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta
            message["role"] += delta.role or ""
            message["content"] += delta.content or ""
            message["reasoning"] += getattr(delta, "reasoning", None) or ""
            for call in delta.tool_calls or ():
                name, arguments, call_id = message["calls"].get(call.index, ("", "", ""))
                function = call.function
                made = (name + (function.name or ""), arguments + (function.arguments or ""), call_id + (call.id or ""))
                message["calls"][call.index] = made
            message["finish_reason"] = choice.finish_reason
    return message


def test_calls_and_thoughts_of_a_whole_answer(client, engine):
    engine.script = TWO
    choice = client.chat.completions.create(**ASKED).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see.\n"
    assert choice.message.reasoning == choice.message.reasoning_content == "Rome or Oslo?"
    calls = [(call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls]
    assert calls == [("function", "weather", '{"place": "Rome"}'), ("function", "weather", '{"place": "Oslo"}')]
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_a_stream_is_the_whole_answer_in_pieces(client, engine):
    engine.script = TWO
    chunks = list(client.chat.completions.create(**ASKED, stream=True))
    message = put_together(chunks)
    assert message["role"] == "assistant"
    assert (message["content"], message["reasoning"]) == ("Let me see.\n", "Rome or Oslo?")
    assert [call[:2] for call in message["calls"].values()] == [
        ("weather", '{"place": "Rome"}'),
        ("weather", '{"place": "Oslo"}'),
    ]
    assert message["finish_reason"] == "tool_calls"
    first = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert [call.function.arguments for call in first[:4]] == ['{"pl', 'ace": "Ro', 'me"}', '{"place": "Oslo"}']


def test_the_clients_own_stream_reader_agrees(client, engine):
    engine.script = TWO
    with client.chat.completions.stream(**ASKED) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.content == "Let me see.\n"
    assert [json.loads(call.function.arguments)["place"] for call in message.tool_calls] == ["Rome", "Oslo"]


def test_one_call_if_that_is_wanted(client, engine):
    engine.script = TWO
    whole = client.chat.completions.create(**ASKED, parallel_tool_calls=False).choices[0].message
    streamed = put_together(client.chat.completions.create(**ASKED, parallel_tool_calls=False, stream=True))
    assert len(whole.tool_calls) == len(streamed["calls"]) == 1


def test_thoughts_can_be_left_out(client, engine):
    engine.script = TWO
    extra = {"include_reasoning": False}
    whole = client.chat.completions.create(**ASKED, extra_body=extra).choices[0].message
    assert not hasattr(whole, "reasoning")
    assert put_together(client.chat.completions.create(**ASKED, extra_body=extra, stream=True))["reasoning"] == ""


def test_a_call_that_was_cut_off_says_length(client, engine):
    engine.script, engine.finish_reason = TWO[:7], "length"
    try:
        choice = client.chat.completions.create(**ASKED).choices[0]
        streamed = put_together(client.chat.completions.create(**ASKED, stream=True))
    finally:
        engine.finish_reason = "stop"
    assert choice.finish_reason == streamed["finish_reason"] == "length"
    assert choice.message.tool_calls[0].function.arguments == streamed["calls"][0][1] == '{"pl'


def test_no_call_is_looked_for_where_there_are_no_tools(client, engine):
    engine.script = TWO[2:]
    message = client.chat.completions.create(**ASKED | {"tools": []}).choices[0].message
    assert message.tool_calls is None
    assert message.content == "".join(TWO[2:])


def test_the_template_sees_tools_and_earlier_calls(client, engine):
    engine.script = ("ok",)
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        *ASKED["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
    ]
    client.chat.completions.create(**ASKED | {"messages": messages})
    text = engine.intake.tokenizer.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert text == (
        '<|system|>{"type": "function", "function": {"name": "weather", "description": "How it is.", '
        '"parameters": {"type": "object", "properties": {}}}}<|end|><|system|>Be brief.<|end|><|user|>Weather?<|end|>'
        "<|assistant|><tool_call>Rome</tool_call><|end|><|tool|>sunny<|end|><|assistant|>"
    )


def test_tools_that_must_not_be_called_are_not_shown(client, engine):
    engine.script = ("ok",)
    client.chat.completions.create(**ASKED, tool_choice="none")
    assert "weather" not in engine.intake.tokenizer.decode(engine.requests[-1].prompt_token_ids)


def test_a_template_that_fails_on_messages_is_the_callers_error(client):
    with pytest.raises(openai.BadRequestError, match="chat template"):
        client.chat.completions.create(**ASKED | {"messages": [{"role": "odd", "content": "x"}]})
