"""/v1/completions through OpenAI's own client."""

import json
import re

import httpx
import openai
import pytest

from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from tests.server.conftest import serving

ASKED = {"model": "tiny", "prompt": "def add(a, b):", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def post(server):
    with httpx.Client(base_url=server.url) as http:
        yield lambda **body: http.post("/v1/completions", json=ASKED | body)


def chunks_of(answer: httpx.Response) -> list[dict]:
    """The frames of a stream, but for the last: [DONE]."""
    *frames, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def test_a_stream_is_the_whole_answer_in_pieces(client):
    whole = client.completions.create(**ASKED)
    chunks = list(client.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_echo_scores_the_prompt_and_nothing_precedes_the_first_token(client):
    choice = client.completions.create(**ASKED | {"max_tokens": 0}, echo=True, logprobs=1).choices[0]
    assert choice.text == "def add(a, b):"
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])


def test_a_mistake_is_told_with_the_field_and_the_nearest_name(client):
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'") as caught:
        client.completions.create(model="tiny", prompt="x", extra_body={"temprature": 1})
    assert caught.value.param == "temprature"


# Characters of several tokens, so that some events have no text.
@pytest.mark.parametrize("prompt", ["def add(a, b):", ["x = ", "日本語 é"], [[5, 6, 7]]])
@pytest.mark.parametrize(
    "more",
    [
        {"logprobs": 2},
        {"logprobs": 0, "n": 2, "temperature": 1.0, "seed": 7},
        {"echo": True, "logprobs": 3},
        {"echo": True, "max_tokens": 0, "logprobs": 1},
        {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True},
        {"prompt_logprobs": 2, "return_token_ids": True},
        {"ignore_eos": True, "logprobs": 1, "stop": ["\n"], "temperature": 1.5, "seed": 3},
    ],
    ids=lambda more: "-".join(more),
)
def test_streams_say_all_that_whole_answers_say(post, prompt, more):
    whole = post(prompt=prompt, **more)
    assert whole.status_code == 200, whole.text
    streamed = post(prompt=prompt, **more, stream=True, stream_options={"continuous_usage_stats": True})
    usages = {}
    for choice in whole.json()["choices"]:
        pieces = []
        for chunk in chunks_of(streamed):
            (piece,) = chunk["choices"]
            if piece["index"] == choice["index"]:
                pieces.append(piece)
            usages[piece["index"] // more.get("n", 1)] = chunk["usage"]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == [choice["finish_reason"]]
        for name in choice["logprobs"] or {}:
            told = [each for piece in pieces for each in piece["logprobs"][name]]
            if name in ("tokens", "text_offset"):
                assert told == choice["logprobs"][name]
            else:
                assert [e is None for e in told] == [e is None for e in choice["logprobs"][name]]
        if more.get("return_token_ids"):
            assert [t for piece in pieces for t in piece["token_ids"]] == choice["token_ids"]
            assert pieces[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        if "prompt_logprobs" in more:
            assert len(pieces[0]["prompt_logprobs"]) == len(choice["prompt_logprobs"])
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert sum(usage[name] for usage in usages.values()) == whole.json()["usage"][name]


def test_tokens_named_by_numbers_are_those_of_the_tokenizer(post, engine):
    logprobs = post(echo=True, max_tokens=0, logprobs=2, return_tokens_as_token_ids=True).json()["choices"][0][
        "logprobs"
    ]
    ids = engine.tokenizer.encode(ASKED["prompt"])
    assert logprobs["tokens"] == [f"token_id:{token}" for token in ids]
    assert all(name.startswith("token_id:") for table in logprobs["top_logprobs"][1:] for name in table)


def test_a_prompt_is_cut_at_its_beginning(post, engine):
    ids = engine.tokenizer.encode(ASKED["prompt"])
    short = post(truncate_prompt_tokens=3, echo=True, return_token_ids=True).json()["choices"][0]
    assert short["prompt_token_ids"] == ids[-3:]
    assert short["text"].startswith(engine.tokenizer.decode(ids[-3:]))
    assert post(truncate_prompt_tokens=100).json()["usage"]["prompt_tokens"] == len(ids)
    fits = post(prompt=[7] * 5000, truncate_prompt_tokens=-1, max_tokens=4).json()["usage"]
    assert fits["prompt_tokens"] + fits["completion_tokens"] == engine.max_model_len


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x"] * 1025}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"guided_regex": "a+", "guided_choice": ["a"]}, "guided_regex"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"deadline_ms": -1}, "deadline_ms"),
        ({"stream_options": {"include_usages": True}}, "include_usages"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(post, body, param):
    answer = post(**body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Bob"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("more", "fits"),
    [
        ({"guided_choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"guided_regex": "[ab]{3}"}, lambda text: re.fullmatch("[ab]{3}", text)),
        ({"guided_grammar": 'start: "x" "y"+ "z"'}, lambda text: re.fullmatch("xy+z", text)),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            lambda text: len(json.loads(text)) == 2,
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
            lambda text: len(json.loads(text)) == 2,
        ),
        ({"guided_json": SCHEMA}, lambda text: len(json.loads(text)) == 2),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_an_answer_has_the_form_that_was_asked_for(post, more, fits):
    free = {} if "structured_outputs" in more else {"temperature": 1.3, "seed": 3}  # greedy, it writes spaces for ever
    answer = post(**more, **free, max_tokens=400)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert fits(choice["text"]), choice["text"]


@pytest.mark.parametrize("more", [{}, {"logprobs": 1}, {"n": 2}])
def test_larger_chunks_say_the_same(client, engine, more):
    asked = {"model": "tiny", "prompt": "def add(a, b):", "max_tokens": 14, "temperature": 0} | more
    whole = client.completions.create(**asked)
    with (
        serving(create_app(ServerConfig(stream_interval=4), ("tiny",), engine)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as patient,
    ):
        choices = [c for chunk in patient.completions.create(**asked, stream=True) for c in chunk.choices]
    assert len(choices) <= 6 * asked.get("n", 1)
    for choice in whole.choices:
        parts = [part for part in choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        if choice.logprobs:
            assert [t for part in parts for t in part.logprobs.tokens] == choice.logprobs.tokens
