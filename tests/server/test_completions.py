"""/v1/completions through OpenAI's own client."""

import openai
import pytest


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_stream_is_the_whole_answer_in_pieces(client):
    asked = {"model": "tiny", "prompt": "def add(a, b):", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_echo_scores_the_prompt_and_nothing_precedes_the_first_token(client):
    asked = {"model": "tiny", "prompt": "def add(a, b):", "max_tokens": 0, "temperature": 0}
    choice = client.completions.create(**asked, echo=True, logprobs=1).choices[0]
    assert choice.text == "def add(a, b):"
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in choice.logprobs.token_logprobs[1:])


def test_a_mistake_is_told_with_the_field_and_the_nearest_name(client):
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'") as caught:
        client.completions.create(model="tiny", prompt="x", extra_body={"temprature": 1})
    assert caught.value.param == "temprature"
