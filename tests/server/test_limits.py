"""Limits and isolation with a real engine behind them."""

import asyncio
import contextlib
import time

import httpx
import openai
import pytest

from jaxserve.errors import RequestError
from jaxserve.request import Request, SamplingParams, Task
from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.limits import review
from tests.server.conftest import serving

PROMPT = list(range(20, 160))  # some full blocks


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("ada: sk-ada\nbob: sk-bob\n")
    return str(path)


def ask(server, key="none", **body):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        return client.completions.create(**({"model": "tiny", "max_tokens": 4, "temperature": 0} | body))


def cached(answer) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("isolated", [True, False])
def test_what_one_client_has_asked_speeds_up_others_only_if_they_are_not_isolated(engine, key_file, isolated):
    prompt = [5 + isolated, *PROMPT]  # new to the cache
    with serving(
        create_app(ServerConfig(api_key_file=key_file, isolate_clients=isolated), ("tiny",), engine)
    ) as server:
        assert cached(ask(server, "sk-ada", prompt=prompt)) == 0
        assert cached(ask(server, "sk-ada", prompt=prompt)) >= 128
        by_bob = cached(ask(server, "sk-bob", prompt=prompt))
        assert by_bob == 0 if isolated else by_bob >= 128
        salted = {"extra_body": {"cache_salt": "mine"}}
        assert cached(ask(server, "sk-ada", prompt=prompt, **salted)) == 0
        assert cached(ask(server, "sk-bob", prompt=prompt, **salted)) == 0, "the same salt of another client"
        assert cached(ask(server, "sk-bob", prompt=prompt, **salted)) >= 128


def test_long_prompts_and_answers_are_refused_with_the_numbers(engine):
    config = ServerConfig(max_prompt_tokens=50, max_tokens_per_request=8, max_answers_per_request=3)
    before = [*engine.intake.reviews], [*engine.listeners]
    with serving(create_app(config, ("tiny",), engine)) as server:
        for body, sentence in (
            ({"prompt": PROMPT}, "140 tokens, and this server takes 50"),
            ({"prompt": PROMPT[:9], "max_tokens": 9}, "max_tokens=9 is above 8"),
            ({"prompt": PROMPT[:9], "n": 4}, "n=4 is above 3"),
            ({"prompt": [PROMPT[:9], PROMPT]}, "140 tokens"),
        ):
            with pytest.raises(openai.BadRequestError, match=sentence):
                ask(server, **body)
        assert len(ask(server, prompt=PROMPT[:9], n=3, max_tokens=8).choices) == 3
    assert (engine.intake.reviews, engine.listeners) == before, "the engine is as it was"


def test_who_does_not_say_how_long_gets_the_most_there_is():
    reviewed = review(ServerConfig(max_tokens_per_request=8))
    request = Request(request_id="r", prompt_token_ids=(1,), params=SamplingParams(max_tokens=None))
    assert reviewed(request).params.max_tokens == 8
    scored = Request(request_id="r", prompt_token_ids=(1,), params=SamplingParams(max_tokens=16), task=Task.SCORE)
    assert reviewed(scored) is scored
    with pytest.raises(RequestError, match="max_tokens=16"):
        reviewed(Request(request_id="r", prompt_token_ids=(1,), params=SamplingParams(max_tokens=16)))


def test_tokens_of_a_minute_are_those_of_prompts_and_answers(engine, key_file):
    config = ServerConfig(api_key_file=key_file, tokens_per_minute=150)
    with serving(create_app(config, ("tiny",), engine)) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-ada", max_retries=0) as client:
            asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "n": 4, "temperature": 0}
            asked["extra_body"] = {"ignore_eos": True}
            answer = client.completions.with_raw_response.create(**asked)
            used = answer.parse().usage.total_tokens
            assert used == 140 + 32
            left = int(answer.headers["x-ratelimit-remaining-tokens"])
            assert left == 0
            with pytest.raises(openai.RateLimitError, match="150 tokens a minute") as caught:
                client.completions.create(**asked)
            wait_s = int(caught.value.response.headers["retry-after"])
            assert wait_s == pytest.approx((used - 150) / 150 * 60, abs=2)
        assert ask(server, "sk-bob", prompt=PROMPT).usage.prompt_tokens == 140


def test_a_timeout_ends_the_request_in_the_engine(engine):
    config = ServerConfig(request_timeout=0.3)
    body = {"prompt": PROMPT, "max_tokens": 800, "ignore_eos": True, "n": 8}
    with serving(create_app(config, ("tiny",), engine)) as server, httpx.Client(base_url=server.url) as client:
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        streamed = client.post("/v1/completions", json=body | {"stream": True})
        assert streamed.status_code == 200 and '"code":"timeout"' in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")
        idle(engine)


def test_more_requests_than_the_engine_takes_are_refused_and_lost_ones_leave_nothing(engine, monkeypatch):
    monkeypatch.setattr(engine._thread, "max_requests", 3)
    before = asyncio.run(engine.metrics())["output_tokens"]
    body = {"prompt": PROMPT, "max_tokens": 800, "ignore_eos": True, "n": 2}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(create_app(ServerConfig(), ("tiny",), engine)))
        client = stack.enter_context(httpx.Client(base_url=server.url))
        for _ in range(3):
            answer = stack.enter_context(client.stream("POST", "/v1/completions", json=body | {"stream": True}))
            assert answer.status_code == 200
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert "3 requests are under way already" in refused.json()["error"]["message"]
    idle(engine)  # those who left took their requests with them
    assert asyncio.run(engine.metrics())["output_tokens"] - before < 3 * 2 * 800


def idle(engine):
    """All requests have ended and nothing is held."""
    end_s = time.monotonic() + 5
    while engine.num_unfinished:
        assert time.monotonic() < end_s
        time.sleep(0.01)
    metrics = asyncio.run(engine.metrics())
    assert metrics["num_running"] == metrics["num_waiting"] == metrics["kv_blocks_held"] == 0
