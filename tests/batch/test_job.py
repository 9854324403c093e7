"""Each field of a request line is obeyed, or refused by name."""

import json

import pytest

from jaxserve.batch.endpoints import Model
from jaxserve.batch.job import Reader, parse_job
from jaxserve.batch.lines import parse_line
from jaxserve.openai.errors import ApiError
from jaxserve.openai.turn import Dialect
from jaxserve.request import SamplingParams
from tests.cli.fake_llm import ByteTokenizer

MODEL = Model(names=["tiny"], tokenizer=ByteTokenizer(), dialect=Dialect(), max_model_len=100, embedding_size=2)
READER = Reader(model=MODEL)


def job_of(url="/v1/completions", **body):
    line = {"custom_id": "a", "method": "POST", "url": url, "body": body}
    return parse_job(parse_line(json.dumps(line))[1], READER)


def completion(**body):
    return job_of(**({"model": "tiny", "prompt": "x"} | body))


def chat(**body):
    return job_of("/v1/chat/completions", **({"messages": [{"role": "user", "content": "x"}]} | body))


def embedding(**body):
    return job_of("/v1/embeddings", **({"input": "x"} | body))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("x", ["x"]), (["x", "y"], ["x", "y"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_prompt_may_be_text_or_token_ids_one_or_many(prompt, prompts):
    assert completion(prompt=prompt).work.prompts() == prompts
    assert embedding(input=prompt).work.prompts() == prompts


def test_completion_options_become_sampling_params():
    job = completion(temperature=0, max_tokens=5, stop="\n", logit_bias={"7": -100}, top_k=3, user="me", seed=None)
    assert job.work.params == SamplingParams(temperature=0, max_tokens=5, stop=["\n"], logit_bias={7: -100.0}, top_k=3)


def test_defaults_are_those_of_each_endpoint():
    assert completion().work.params == SamplingParams(max_tokens=16)
    assert chat().work.params == SamplingParams(max_tokens=None)


def test_chat_logprobs_are_a_switch_and_a_number():
    assert chat(logprobs=True).work.params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).work.params.logprobs == 5
    assert chat(logprobs=False).work.params.logprobs is None
    assert chat(max_completion_tokens=9).work.params.max_tokens == 9


def test_text_parts_of_a_message_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (prompt,) = chat(messages=[{"role": "user", "content": parts}]).work.prompts()
    assert prompt["prompt"] == "<user>a\nb"


@pytest.mark.parametrize("line", ["", "{", "[1]", "nonsense", '"text"', "null", "[" * 5000, "1" * 5000])
def test_a_line_that_is_not_a_json_object_says_so(line):
    with pytest.raises(ApiError) as caught:
        parse_line(line)
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("raw", [{}, {"custom_id": 7}, {"custom_id": ""}, {"custom_id": None}])
def test_a_line_needs_a_custom_id(raw):
    with pytest.raises(ApiError) as caught:
        parse_line(json.dumps(raw))
    assert caught.value.code == "missing_custom_id"


def test_half_a_surrogate_pair_is_not_text():
    with pytest.raises(ApiError, match="surrogate"):
        parse_line('{"custom_id": "a", "body": {"prompt": "\\ud800"}}')


@pytest.mark.parametrize(
    ("line", "param"),
    [
        ({"url": "/v1/images", "body": {}}, "url"),
        ({"body": {}}, "url"),
        ({"url": ["x"], "body": {}}, "url"),
        ({"url": "/v1/completions"}, "body"),
        ({"url": "/v1/completions", "body": [1]}, "body"),
        ({"url": "/v1/completions", "body": {"prompt": "x"}, "method": "GET"}, "method"),
        ({"url": "/v1/completions", "body": {"prompt": "x"}, "bodi": 1}, "bodi"),
    ],
)
def test_the_frame_of_a_line_is_checked(line, param):
    with pytest.raises(ApiError) as caught:
        parse_job({"custom_id": "a"} | line, READER)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("make", "body", "param"),
    [
        (completion, {"prompt": None}, "prompt"),
        (completion, {"prompt": []}, "prompt"),
        (completion, {"prompt": ["x", 1]}, "prompt"),
        (completion, {"prompt": [True]}, "prompt"),
        (completion, {"prompt": {"x": 1}}, "prompt"),
        (completion, {"temprature": 1}, "temprature"),
        (completion, {"temperature": "hot"}, "temperature"),
        (completion, {"temperature": True}, "temperature"),
        (completion, {"temperature": float("nan")}, "temperature"),
        (completion, {"temperature": -1}, "temperature"),
        (completion, {"max_tokens": 2.5}, "max_tokens"),
        (completion, {"max_tokens": -1}, "max_tokens"),
        (completion, {"n": 0}, "n"),
        (completion, {"n": 10**30}, "n"),
        (completion, {"logprobs": 21}, "logprobs"),
        (completion, {"logprobs": True}, "logprobs"),
        (completion, {"stop": 3}, "stop"),
        (completion, {"stop": [""]}, "stop"),
        (completion, {"logit_bias": {"a": 1}}, "logit_bias"),
        (completion, {"logit_bias": {"1": "x"}}, "logit_bias"),
        (completion, {"logit_bias": {"1": float("inf")}}, "logit_bias"),
        (completion, {"stream": True}, "stream"),
        (completion, {"best_of": 3}, "best_of"),
        (completion, {"suffix": "x"}, "suffix"),
        (completion, {"messages": []}, "messages"),
        (completion, {"model": "gpt-4"}, "model"),
        (completion, {"model": 7}, "model"),
        (completion, {"allowed_token_ids": []}, "allowed_token_ids"),
        (completion, {"structured_outputs": 3}, "structured_outputs"),
        (completion, {"structured_outputs": "json"}, "structured_outputs"),
        (completion, {"structured_outputs": {}}, "structured_outputs"),
        (chat, {"messages": None}, "messages"),
        (chat, {"messages": []}, "messages"),
        (chat, {"messages": "hi"}, "messages"),
        (chat, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        (chat, {"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        (chat, {"prompt": "x"}, "prompt"),
        (chat, {"logprobs": 3}, "logprobs"),
        (chat, {"top_logprobs": 3}, "top_logprobs"),
        (chat, {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        (chat, {"tools": [{"type": "function"}]}, "tools"),
        (chat, {"response_format": {"type": "xml"}}, "response_format"),
        (embedding, {"input": None}, "input"),
        (embedding, {"encoding_format": "hex"}, "encoding_format"),
        (embedding, {"dimensions": 8}, "dimensions"),
        (embedding, {"temperature": 1.0}, "temperature"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(make, body, param):
    with pytest.raises(ApiError) as caught:
        make(**body)
    assert caught.value.param.startswith(param)
    assert caught.value.status in (400, 404)


def test_neutral_values_of_fields_that_are_not_supported_are_accepted():
    chat(stream=False, tools=[], tool_choice="none", response_format={"type": "text"}, store=False, stream_options=None)
    completion(best_of=2, n=2, suffix="", stream=False, metadata={"a": "b"})


def test_a_misspelt_field_is_told_the_right_one():
    with pytest.raises(ApiError, match="did you mean 'temperature'"):
        completion(temprature=1)
