"""The commands on the real engine: what they print is what `LLM` answers."""

import base64
import json
import random

import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from tests.cli.checkpoint import ENGINE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items() if name != "progress"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(checkpoint):
    return LLM(checkpoint, **ENGINE)


def test_generate_streams_what_generate_returns(cli, checkpoint, llm):
    done = cli("generate", checkpoint, "hello", *FLAGS, "--no-progress", "--max-tokens=8", "--ignore-eos")
    assert done.out == llm.generate("hello", GREEDY)[0].outputs[0].text + "\n"
    assert done.err.startswith("[8 tokens, ")


def test_generate_gives_json_with_logprobs(cli, checkpoint, llm):
    options = ["--json", "--n=2", "--seed=7", "--temperature=1", "--logprobs=2", "--max-tokens=4", "--ignore-eos"]
    done = cli("generate", checkpoint, "hello", *FLAGS, "--no-progress", *options)
    (row,) = [json.loads(line) for line in done.out.splitlines()]
    params = SamplingParams(n=2, seed=7, temperature=1.0, logprobs=2, max_tokens=4, ignore_eos=True)
    expected = llm.generate("hello", params)[0].outputs
    assert [answer["token_ids"] for answer in row["outputs"]] == [answer.token_ids for answer in expected]
    assert all(len(answer["logprobs"]) == 4 for answer in row["outputs"])


def test_run_batch_answers_every_endpoint(cli, checkpoint, llm, tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    greedy = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    bodies = {
        "completion": ("/v1/completions", {"prompt": "hello", **greedy, "logprobs": 1}),
        "chat": ("/v1/chat/completions", {"messages": messages, **greedy, "logprobs": True, "top_logprobs": 3}),
        "embedding": ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
        "scored": ("/v1/completions", {"prompt": "hello", "echo": True, "logprobs": 0, "max_tokens": 0}),
        "too long": ("/v1/completions", {"prompt": "x" * 500}),
    }
    lines = [json.dumps({"custom_id": name, "url": url, "body": body}) for name, (url, body) in bodies.items()]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    files = ["-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl"]
    assert cli("run-batch", *files, "--model", checkpoint, *FLAGS, "--no-progress").code == 0
    rows = {row["custom_id"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    body = {name: row["response"]["body"] for name, row in rows.items()}

    expected = llm.generate("hello", GREEDY)[0].outputs[0]
    assert body["completion"]["choices"][0]["text"] == expected.text
    assert len(body["completion"]["choices"][0]["logprobs"]["tokens"]) == 8
    assert body["chat"]["choices"][0]["message"]["content"] == llm.chat(messages, GREEDY)[0].outputs[0].text
    assert all(len(token["top_logprobs"]) == 3 for token in body["chat"]["choices"][0]["logprobs"]["content"])
    vectors = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in body["embedding"]["data"]]
    np.testing.assert_allclose(vectors, llm.embed(["a", "b"]), atol=1e-5)
    scored = body["scored"]["choices"][0]["logprobs"]["token_logprobs"]
    assert scored[0] is None
    assert sum(scored[1:]) == pytest.approx(llm.score("h", ["ello"])[0].logprob, abs=1e-3)
    assert rows["too long"]["response"]["status_code"] == 400


def test_run_batch_in_groups_answers_what_it_would_without_them(cli, tmp_path):
    """The bundled model, and a pool that holds three of the six beginnings."""
    heads = [f"# module {n}\n" + "import os\n" * 20 for n in range(6)]
    rows = [(f"{n}-{m}", head + f"def f{m}(x):") for n, head in enumerate(heads) for m in range(5)]
    random.Random(0).shuffle(rows)
    body = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    lines = [json.dumps({"custom_id": n, "url": "/v1/completions", "body": body | {"prompt": p}}) for n, p in rows]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    sizes = ["--num-kv-blocks=32", "--block-size=8", "--max-model-len=256", "--max-num-seqs=8", "--dtype=float32"]
    answers, cached = [], []
    for policy in ("fcfs", "batchllm"):
        files = ["-i", tmp_path / "in.jsonl", "-o", tmp_path / f"{policy}.jsonl", "--model", "tiny"]
        options = [f"--scheduling-policy={policy}", "--max-num-batched-tokens=64", "--no-progress"]
        assert cli("run-batch", *files, *sizes, *options).code == 0
        results = map(json.loads, (tmp_path / f"{policy}.jsonl").read_text().splitlines())
        bodies = {result["custom_id"]: result["response"]["body"] for result in results}
        assert len(bodies) == 30
        answers.append({name: body["choices"][0]["text"] for name, body in bodies.items()})
        cached.append(sum(body["usage"]["prompt_tokens_details"]["cached_tokens"] for body in bodies.values()))
    assert answers[0] == answers[1]
    assert cached[1] > 1.5 * cached[0]


def test_bench_measures_what_was_asked_for(cli, checkpoint, tmp_path):
    target = tmp_path / "result.json"
    options = ["--num-prompts=3", "--input-len=8", "--output-len=4", "--json", target]
    assert cli("bench", "throughput", "--model", checkpoint, *FLAGS, "--no-progress", *options).code == 0
    result = json.loads(target.read_text())
    assert result["total_tokens_per_s"] == pytest.approx(3 * result["output_tokens_per_s"])
    assert result["compiles_after_ready"] == 0


def test_chat_answers_and_leaves(cli, checkpoint, monkeypatch):
    lines = iter(["hi", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    done = cli("chat", checkpoint, *FLAGS, "--no-progress", "--max-tokens=4", "--temperature=0", "--ignore-eos")
    assert done.code == 0
    assert done.out.strip()
