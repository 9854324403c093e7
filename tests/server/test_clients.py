"""OpenAI's own client on every route: answers, streams, errors, many at once, and callers who go away."""

import asyncio
import json
import time
from types import SimpleNamespace

import httpx
import openai
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.async_engine import AsyncEngine
from jaxserve.errors import InvariantError
from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from tests.fakes import EOS, VOCAB_SIZE, make_engine
from tests.server.conftest import serving

PROMPTS = ["def add(a, b):", "import os", "class Stack:\n", "for i in range(", "x = [1, 2"]
LONG = {"max_tokens": 1800, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def idle_within(engine: AsyncEngine, seconds: float, run) -> None:
    """Nothing is under way, and nothing is held."""
    end_s = time.monotonic() + seconds
    while engine.num_unfinished:
        assert time.monotonic() < end_s, f"{engine.num_unfinished} requests are still under way"
        time.sleep(0.005)
    metrics = run(engine.metrics())
    assert metrics["num_running"] == metrics["num_waiting"] == metrics["kv_blocks_held"] == 0


def test_every_route_answers_the_synchronous_client(client):
    asked = {"model": "tiny", "temperature": 0}
    talk = [{"role": "user", "content": "Write a function."}]
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert client.completions.create(prompt="import", max_tokens=4, **asked).usage.completion_tokens == 4
    whole = client.chat.completions.create(messages=talk, max_completion_tokens=8, **asked)
    pieces = client.chat.completions.create(messages=talk, max_completion_tokens=8, stream=True, **asked)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces if chunk.choices)
    assert text == whole.choices[0].message.content
    response = client.responses.create(input="Write a function.", max_output_tokens=16, **asked)
    events = list(client.responses.create(input="Write a function.", max_output_tokens=16, stream=True, **asked))
    assert (events[0].type, events[-1].type) == ("response.created", f"response.{response.status}")
    assert events[-1].response.output_text == response.output_text
    assert len(client.embeddings.create(model="tiny", input=["a", "b"]).data) == 2
    found = client.post("/score", body={"text_1": "a", "text_2": "a"}, cast_to=object)
    assert found["data"][0]["score"] == pytest.approx(1.0, abs=1e-5)


def test_files_and_batches_of_the_synchronous_client(client):
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "import", "max_tokens": 4}}
    file = client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    end_s = time.monotonic() + 20
    while batch.status not in ("completed", "failed") and time.monotonic() < end_s:
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed", batch
    (row,) = map(json.loads, client.files.content(batch.output_file_id).text.splitlines())
    assert row["response"]["body"]["usage"]["completion_tokens"] == 4
    assert batch.id in [each.id for each in client.batches.list()]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_64_at_once_are_the_answers_of_the_offline_engine(server, run):
    prompts = [f"{PROMPTS[number % len(PROMPTS)]}{number}" for number in range(64)]
    offline = LLM("tiny", max_num_seqs=8, progress=False)
    expected = [o.outputs[0].text for o in offline.generate(prompts, SamplingParams(temperature=0.0, max_tokens=16))]

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                asked = {"model": "tiny", "prompt": prompts[number], "max_tokens": 16, "temperature": 0}
                if number % 2:
                    return (await client.completions.create(**asked)).choices[0].text
                stream = await client.completions.create(**asked, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, range(64)))

    assert run(main()) == expected
    idle_within(server.engine, 1, run)


@pytest.mark.parametrize(
    ("call", "error", "code"),
    [
        (lambda c: c.completions.create(model="tiny", prompt="x", temperature=-1), openai.BadRequestError, None),
        (lambda c: c.completions.create(model="gpt-5", prompt="x"), openai.NotFoundError, "model_not_found"),
        (lambda c: c.models.retrieve("gpt-5"), openai.NotFoundError, "model_not_found"),
        (lambda c: c.post("/nowhere", body={}, cast_to=object), openai.NotFoundError, None),
        (lambda c: c.get("/completions", cast_to=object), openai.APIStatusError, None),
        (
            lambda c: c.completions.create(model="tiny", prompt=[5] * 5000),
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        (lambda c: c.chat.completions.create(model="tiny", messages=[]), openai.BadRequestError, None),
        (lambda c: c.embeddings.create(model="tiny", input=[]), openai.BadRequestError, None),
    ],
)
def test_mistakes_are_the_clients_own_errors(client, call, error, code):
    with pytest.raises(error) as caught:
        call(client)
    assert caught.value.code == code
    assert caught.value.body["message"]


def test_a_stream_that_cannot_begin_is_an_error_and_no_stream(client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="x", stream=True, temperature=-1)


def test_keys_and_limits_are_the_clients_own_errors(engine):
    app = create_app(ServerConfig(api_key=("secret",), requests_per_minute=2), ("tiny",), engine)
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    with serving(app) as running:
        wrong = openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0)
        right = openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret", max_retries=0)
        with wrong, right:
            with pytest.raises(openai.AuthenticationError):
                wrong.completions.create(**asked)
            for _ in range(2):
                right.completions.create(**asked)
            with pytest.raises(openai.RateLimitError):
                right.completions.create(**asked)


def test_too_many_requests_and_no_model_are_503():
    with serving(create_app(ServerConfig(), ("tiny",))) as running:
        with (
            openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
            pytest.raises(openai.InternalServerError, match="still being loaded") as caught,
        ):
            client.completions.create(model="tiny", prompt="x")
        assert caught.value.status_code == 503
        assert httpx.get(f"{running.url}/health").status_code == 200
        assert httpx.get(f"{running.url}/ready").status_code == 503


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses"])
def test_a_caller_who_goes_away_ends_the_request(server, run, path, stream):
    body = {
        "completions": {"prompt": "x", "max_tokens": 1800, "ignore_eos": True},
        "chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1800, "ignore_eos": True},
        "responses": {"input": "x", "max_output_tokens": 1800, "ignore_eos": True},
    }[path]

    async def main():
        async with httpx.AsyncClient(base_url=f"{server.url}/v1") as http:
            body["stream"] = stream

            async def ask():
                async with http.stream("POST", path, json=body | {"temperature": 0}) as answer:
                    assert answer.status_code == 200, await answer.aread()
                    async for _ in answer.aiter_bytes():
                        if stream:
                            return

            asking = asyncio.ensure_future(ask())
            while not server.engine.num_unfinished and not asking.done():
                await asyncio.sleep(0.002)
            if not stream:
                await asyncio.sleep(0.05)
                assert server.engine.num_unfinished, "it was too quick"
                asking.cancel()
            await asyncio.wait([asking])

    run(main())
    idle_within(server.engine, 1, run)


def test_an_engine_that_fails_is_told_to_callers_and_to_whoever_watches():
    rig = make_engine(num_blocks=2048, max_model_len=4096)
    model = SimpleNamespace(eos_token_ids=(EOS,), vocab_size=VOCAB_SIZE, embed_size=1)
    built = SimpleNamespace(engine=rig.engine, tokenizer=None, model=model, max_model_len=4096, metrics=dict)
    engine = AsyncEngine.of(built)
    steps = iter(range(50))
    work = rig.engine.step

    def step():
        if next(steps, None) is None:
            raise InvariantError("wrong books")
        return work()

    rig.engine.step = step
    asked = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
    with serving(create_app(ServerConfig(), ("tiny",), engine)) as running:
        assert httpx.get(f"{running.url}/health").status_code == 200
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.APIError, match="engine has failed"):
                list(client.completions.create(**asked, stream=True))
            with pytest.raises(openai.InternalServerError, match="engine has failed") as caught:
                client.completions.create(**asked)
            assert caught.value.status_code == 503
        assert httpx.get(f"{running.url}/health").status_code == 503
        assert httpx.get(f"{running.url}/ready").status_code == 503
    engine.close()
