"""/v1/chat/completions through OpenAI's own client."""

import asyncio

import httpx
import openai
import pytest

MESSAGES = [{"role": "user", "content": "def add(a, b):"}]
ASKED = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"place": {"enum": ["Rome", "Oslo"]}, "warm": {"type": "boolean"}},
                "required": ["place", "warm"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "nothing"}},
]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_an_answer_is_that_of_the_engine(client, engine):
    whole = client.chat.completions.create(**ASKED)
    text = engine.tokenizer.apply_chat_template(MESSAGES)
    offline = client.completions.create(
        model="tiny",
        prompt=engine.tokenizer.encode(text, add_special_tokens=False),
        max_tokens=12,
        temperature=0,
    )
    assert whole.choices[0].message.content == offline.choices[0].text
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == offline.choices[0].finish_reason
    assert whole.usage.completion_tokens == offline.usage.completion_tokens
    assert whole.object == "chat.completion"


def test_a_stream_is_the_whole_answer_in_pieces(client):
    asked = ASKED | {"n": 2, "logprobs": True, "top_logprobs": 2, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    assert not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for index, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        told = [token for c in mine if c.logprobs for token in c.logprobs.content]
        assert told == choice.logprobs.content
        assert len(told) == 12
        assert all(len(token.top_logprobs) == 2 for token in told)


@pytest.mark.parametrize(
    "options", [{"continuous_usage_stats": True}, {"continuous_usage_stats": True, "include_usage": True}]
)
def test_continuous_usage_counts_what_was_told_so_far(client, options):
    asked = ASKED | {"extra_body": {"ignore_eos": True}}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 12)
    assert (not chunks[-1].choices) == ("include_usage" in options)


def test_the_last_message_can_be_continued(client):
    messages = [*MESSAGES, {"role": "assistant", "content": "    return a"}]
    asked = ASKED | {"messages": messages}
    went_on = client.chat.completions.create(**asked, extra_body={"continue_final_message": True})
    prompt = "<|bos|><|user|>def add(a, b):<|end|><|assistant|>    return a"
    direct = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=12, temperature=0, extra_body={"add_special_tokens": False}
    )
    assert went_on.choices[0].message.content == direct.choices[0].text
    assert went_on.usage.prompt_tokens == direct.usage.prompt_tokens


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"messages": []}, "messages", "there are no messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "text only",
        ),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "differ"),
        ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs", "at most 20"),
        ({"tools": TOOLS}, "tool_choice", "--tool-call-parser"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "rain"}}}, "tool_choice", "'rain'"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools", "same name"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tools", "both"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "JSON schema"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "together"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "knows no"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "must not set"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "contradict"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(server, body, param, told):
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=ASKED | body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], told in error["message"]) == (param, True), error
    assert error["type"] == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_taken(client):
    plain = client.chat.completions.create(**ASKED)
    extra = {
        "user": "ada",
        "metadata": {"a": "b"},
        "store": False,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "modalities": ["text"],
    }
    same = client.chat.completions.create(**ASKED, extra_body=extra)
    assert same.choices[0].message.content == plain.choices[0].message.content


def test_parts_of_text_are_lines(client):
    parts = [{"type": "text", "text": "import os"}, {"type": "text", "text": "def f("}]
    one = client.chat.completions.create(**ASKED | {"messages": [{"role": "user", "content": parts}]})
    other = client.chat.completions.create(**ASKED | {"messages": [{"role": "user", "content": "import os\ndef f("}]})
    assert one.choices[0].message.content == other.choices[0].message.content
    assert one.usage.prompt_tokens == other.usage.prompt_tokens


def test_a_caller_who_leaves_ends_the_request(client, engine):
    stream = client.chat.completions.create(**ASKED | {"max_tokens": 1500}, stream=True)
    next(iter(stream))
    stream.close()

    async def idle():
        for _ in range(400):
            if not engine.num_unfinished:
                return True
            await asyncio.sleep(0.01)
        return False

    assert asyncio.run(idle())
