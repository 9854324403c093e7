"""/v1/responses through OpenAI's own client: the bundled model, and a scripted one that calls tools and thinks."""

import asyncio
import json
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import TypeAdapter

from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from jaxserve.tokenizer import Tokenizer, load_tokenizer
from tests.server.conftest import serving
from tests.server.scripted import ScriptedEngine

TEMPLATE = """{%- for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}
{{- m.content }}{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments.place }}]
{%- endfor %}<|end|>{% endfor %}<|assistant|>"""
ASKED = {"model": "tiny", "input": "def add(a, b):", "max_output_tokens": 12, "temperature": 0}
TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    "strict": False,
}
SAID = (
    "<think>Rome",
    "?</think>Let ",
    "me.\n<tool_call>",
    '{"name": "weather", "arguments": {"pl',
    'ace": "Rome"}}',
    "</tool_call>",
)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def script():
    tokenizer = load_tokenizer(Path(__file__).parents[2] / "jaxserve" / "assets" / "tiny")
    assert tokenizer is not None
    return ScriptedEngine(Tokenizer(tokenizer._backend, chat_template=TEMPLATE, special_tokens={}))


@pytest.fixture(scope="module")
def scripted(script):
    config = ServerConfig(reasoning_parser="qwen3", tool_call_parser="hermes", response_store_bytes=20_000)
    with (
        serving(create_app(config, ("tiny",), script)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


def check_types(thing):
    """Everything that the client's types require is there, and of the right type: the client itself does not check."""
    TypeAdapter(type(thing)).validate_python(thing.to_dict(mode="python"))


def prompt_of(script):
    return script.intake.tokenizer.decode(script.requests[-1].prompt_token_ids, skip_special_tokens=False)


def test_an_answer_is_that_of_chat(client):
    response = client.responses.create(**ASKED, instructions="Be brief.", metadata={"a": "b"})
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED["input"]}],
        max_tokens=12,
        temperature=0,
    )
    check_types(response)
    assert response.output_text == chat.choices[0].message.content
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.instructions == "Be brief."
    assert response.metadata == {"a": "b"}


def test_events_tell_the_response_in_pieces(client):
    asked = ASKED | {"extra_body": {"ignore_eos": True}, "top_logprobs": 2}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    for event in events:
        check_types(event)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text
    last = events[-1].response
    assert last.status == whole.status == "incomplete"
    assert last.incomplete_details.reason == "max_output_tokens"
    assert last.usage.output_tokens == 12
    assert last.output[0].content[0].logprobs == whole.output[0].content[0].logprobs
    assert len(whole.output[0].content[0].logprobs) == 12


def test_asyncio_gets_the_same(client, server):
    async def both():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as asking:
            whole = await asking.responses.create(**ASKED)
            async with asking.responses.stream(**ASKED) as stream:
                return whole, await stream.get_final_response()

    whole, streamed = asyncio.run(both())
    assert whole.output_text == streamed.output_text == client.responses.create(**ASKED).output_text


def test_a_conversation_goes_on(client):
    first = client.responses.create(**ASKED)
    second = client.responses.create(**ASKED | {"input": "import os"}, previous_response_id=first.id)
    told = [
        {"role": "user", "content": ASKED["input"]},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "import os"},
    ]
    whole = client.responses.create(**ASKED | {"input": told})
    assert second.output_text == whole.output_text
    assert second.usage.input_tokens == whole.usage.input_tokens
    assert first.id.startswith("resp_") and first.output[0].id.startswith("msg_"), "clients look at these"
    assert second.previous_response_id == first.id


def test_a_response_can_be_asked_for_and_forgotten(client):
    made = client.responses.create(**ASKED)
    assert client.responses.retrieve(made.id) == made
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(made.id)
    with pytest.raises(openai.BadRequestError, match="send the whole conversation"):
        client.responses.create(**ASKED, previous_response_id=made.id)
    unkept = client.responses.create(**ASKED, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_old_responses_make_room(scripted, script):
    script.script = ("ok",)
    made = [scripted.responses.create(**ASKED | {"input": "x" * 1000}) for _ in range(12)]
    scripted.responses.retrieve(made[-1].id)
    with pytest.raises(openai.NotFoundError):
        scripted.responses.retrieve(made[0].id)


def test_thoughts_text_and_calls_are_items(scripted, script):
    script.script = SAID
    response = scripted.responses.create(**ASKED, tools=[TOOL])
    check_types(response)
    thought, text, call = response.output
    assert thought.content[0].text == "Rome?"
    assert text.content[0].text == "Let me.\n"
    assert (call.name, json.loads(call.arguments)) == ("weather", {"place": "Rome"})
    assert {item.status for item in response.output} == {"completed"}
    assert response.usage.output_tokens_details.reasoning_tokens > 0


def test_a_stream_of_items(scripted, script):
    script.script = SAID
    with scripted.responses.stream(**ASKED, tools=[TOOL]) as stream:
        put_together = stream.get_final_response()
    events = list(scripted.responses.create(**ASKED, tools=[TOOL], stream=True))
    for event in events:
        check_types(event)
    final = events[-1].response
    assert [item.type for item in put_together.output] == [item.type for item in final.output]
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert deltas == ['{"pl', 'ace": "Rome"}']
    added = [event.output_index for event in events if event.type == "response.output_item.added"]
    done = [event.output_index for event in events if event.type == "response.output_item.done"]
    assert added == done == [0, 1, 2]
    ids = {item.id for item in final.output}
    assert {event.item_id for event in events if hasattr(event, "item_id")} == ids


def test_items_come_back_as_messages(scripted, script):
    script.script = SAID
    first = scripted.responses.create(**ASKED, tools=[TOOL])
    script.script = ("Sunny.",)
    call = first.output[-1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items = [item.to_dict() for item in first.output]
    scripted.responses.create(**ASKED | {"input": [{"role": "user", "content": "Hm?"}, *items, result]}, tools=[TOOL])
    said = "<|assistant|>(Rome?)Let me.\n[weather Rome]<|end|><|tool|>sunny<|end|><|assistant|>"
    assert prompt_of(script) == "<|user|>Hm?<|end|>" + said
    scripted.responses.create(**ASKED | {"input": [result]}, previous_response_id=first.id, tools=[TOOL])
    assert prompt_of(script) == f"<|user|>{ASKED['input']}<|end|>" + said.replace("(Rome?)", "")


def test_a_response_that_is_lost_says_so(scripted, script):
    script.script, script.error = ("One ", "two"), "the device is gone"
    try:
        events = list(scripted.responses.create(**ASKED, stream=True))
        with pytest.raises(openai.InternalServerError, match="device is gone"):
            scripted.responses.create(**ASKED)
    finally:
        script.error = None
    for event in events:
        check_types(event)
    assert (events[-1].type, events[-1].response.status) == ("response.failed", "failed")
    assert "device is gone" in events[-1].response.error.message
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_nobody_reads_continues_or_deletes_what_is_anothers(script):
    script.script = ("ok",)
    config = ServerConfig(api_key=("key-of-ada", "key-of-bob"))
    with serving(create_app(config, ("tiny",), script)) as server:
        ada, bob = (openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) for key in config.api_key)
        with ada, bob:
            made = ada.responses.create(**ASKED)
            with pytest.raises(openai.NotFoundError):
                bob.responses.retrieve(made.id)
            with pytest.raises(openai.NotFoundError):
                bob.responses.delete(made.id)
            with pytest.raises(openai.BadRequestError, match="there is no response"):
                bob.responses.create(**ASKED, previous_response_id=made.id)
            assert ada.responses.retrieve(made.id).output_text == "ok"


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "items are of type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content",
            "text only",
        ),
        ({"input": []}, "input", "at least one"),
        ({"n": 2}, "n", "not supported"),
        ({"max_tokens": 2}, "max_tokens", "not supported"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"background": True}, "background", "not supported"),
        ({"conversation": "c"}, "conversation", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"tools": [{"type": "web_search", "name": "x"}]}, "tools[0].type", "function"),
        ({"tools": [TOOL]}, "tool_choice", "--tool-call-parser"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "JSON schema"),
        ({"reasoning": {"effort": "low"}}, "reasoning_effort", "knows no"),
        ({"previous_response_id": "resp-../../x"}, "previous_response_id", "there is no response"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(server, body, param, told):
    answer = httpx.post(f"{server.url}/v1/responses", json=ASKED | body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], told in error["message"]) == (param, True), error
