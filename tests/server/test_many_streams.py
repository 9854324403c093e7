"""256 streams at once: each is what the same request gets offline, and nothing is left behind."""

import asyncio
import json
import random
import time

import pytest

from jaxserve.async_engine import AsyncEngine
from jaxserve.llm import LLM
from jaxserve.loadgen.client import Answer, Client
from jaxserve.loadgen.http import Host
from jaxserve.request import SamplingParams
from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from tests.server.conftest import serving

NUM_STREAMS = 256
OPTIONS = {"max_num_seqs": 64, "max_num_batched_tokens": 256, "progress": False}


def cases():
    """Prompts as token ids, and options: greedy and sampled, short and long, some with a prefix in common."""
    rng = random.Random(7)
    shared = [rng.randrange(300, 1000) for _ in range(40)]
    for number in range(NUM_STREAMS):
        own = [rng.randrange(300, 1000) for _ in range(rng.randint(1, 40))]
        fields = {"max_tokens": rng.randint(1, 32), "temperature": 0.0, "ignore_eos": rng.random() < 0.7}
        if number % 3 == 0:
            fields |= {"temperature": 0.8, "seed": number}
        yield (shared if number % 4 == 0 else []) + own, fields


async def ask_all(url: str) -> list[Answer]:
    bodies = [
        {"model": "tiny", "prompt": prompt, "stream": True, "stream_options": {"include_usage": True}} | fields
        for prompt, fields in cases()
    ]
    client = Client(Host(url), headers={}, timeout_s=120)
    try:
        return await asyncio.gather(*(client.ask("/v1/completions", json.dumps(body).encode()) for body in bodies))
    finally:
        await client.close()


@pytest.mark.slow
def test_each_stream_is_that_of_the_offline_run():
    prompts, fields = zip(*cases(), strict=True)
    outputs = LLM("tiny", **OPTIONS).generate(list(prompts), [SamplingParams(**each) for each in fields])
    engine = AsyncEngine("tiny", max_requests=NUM_STREAMS, **OPTIONS)
    try:
        with serving(create_app(ServerConfig(), ("tiny",), engine)) as server:
            answers = asyncio.run(ask_all(server.url))
        for output, answer in zip(outputs, answers, strict=True):
            wanted = output.outputs[0]
            assert answer.error == "", answer.error_text
            assert answer.text == wanted.text
            assert (answer.num_output, answer.finish_reason) == (len(wanted.token_ids), wanted.finish_reason)
            assert answer.num_prompt == len(output.prompt_token_ids)
        until_s = time.monotonic() + 10
        while engine.counts()["num_running"] and time.monotonic() < until_s:
            time.sleep(0.01)
        facts = engine.counts()
        assert (engine.num_unfinished, facts["num_running"], facts["num_waiting"], facts["kv_blocks_held"]) == (
            0,
            0,
            0,
            0,
        )
        assert facts["compiles_after_ready"] == 0
    finally:
        engine.close()
