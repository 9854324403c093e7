"""run-batch: every line is answered once, in OpenAI's shapes, whatever the line and whenever the run is killed."""

import base64
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxserve.errors import JaxserveError
from tests.cli.checkpoint import ENGINE
from tests.cli.fake_llm import FakeEngine

ROOT = Path(__file__).resolve().parents[2]


def line(custom_id, url="/v1/completions", **body):
    body = {"prompt": custom_id} | body if url == "/v1/completions" else body
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def say(text):
    return [{"role": "user", "content": text}]


def by_id(results):
    assert len({result["custom_id"] for result in results}) == len(results)
    return {result["custom_id"]: result for result in results}


def body_of(result):
    assert result["error"] is None
    assert result["response"]["status_code"] == 200
    return result["response"]["body"]


def test_a_completion_has_openai_shape(batch):
    (result,) = batch([line("hello", max_tokens=3, model="toy")])
    assert result["id"].startswith("batch_req_")
    body = body_of(result)
    assert (body["object"], body["model"]) == ("text_completion", "toy")
    (choice,) = body["choices"]
    assert (choice["index"], choice["text"], choice["finish_reason"], choice["logprobs"]) == (0, "HEL", "length", None)
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (5, 3)


def test_choices_of_several_prompts_and_answers_are_numbered_through(batch):
    (result,) = batch([line("x", prompt=[[97, 98], [99, 100]], n=2)])
    choices = body_of(result)["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [(0, "AB"), (1, "AB"), (2, "CD"), (3, "CD")]
    assert body_of(result)["usage"]["total_tokens"] == 4 + 8


def test_completion_logprobs_are_parallel_lists_of_finite_numbers(batch):
    (result,) = batch([line("ab", logprobs=2, echo=True)])
    (choice,) = body_of(result)["choices"]
    assert choice["text"] == "abAB"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "A", "B"]
    assert logprobs["token_logprobs"] == [None, -1.0, -2.0, -2.0]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["top_logprobs"][2] == {"A": -2.0, "!": -0.5, "?": -9999.0}


def test_echo_without_new_tokens_only_scores_the_prompt(batch):
    (result,) = batch([line("ab", logprobs=1, echo=True, max_tokens=0)])
    body = body_of(result)
    assert body["choices"][0]["text"] == "ab"
    assert body["choices"][0]["logprobs"]["tokens"] == ["a", "b"]
    assert body["usage"]["completion_tokens"] == 0


def test_a_chat_completion_has_openai_shape(batch):
    url = "/v1/chat/completions"
    (result,) = batch([line("a", url, messages=say("hi"), logprobs=True, top_logprobs=1, n=2)])
    body = body_of(result)
    assert body["object"] == "chat.completion"
    assert [choice["message"]["content"] for choice in body["choices"]] == ["<USER>HI"] * 2
    first = body["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["bytes"], first["logprob"]) == ("<", [60], -2.0)
    assert [top["token"] for top in first["top_logprobs"]] == ["!"]


def test_embeddings_are_unit_vectors_as_numbers_or_base64(batch):
    url = "/v1/embeddings"
    results = by_id(batch([line("a", url, input=["x", "y"]), line("b", url, input="x", encoding_format="base64")]))
    body = body_of(results["a"])
    assert [row["index"] for row in body["data"]] == [0, 1]
    assert body["data"][0]["embedding"] == pytest.approx([0.6, 0.8])
    packed = base64.b64decode(body_of(results["b"])["data"][0]["embedding"])
    assert struct.unpack("<2f", packed) == pytest.approx((0.6, 0.8))


BAD_LINES = [
    ("not json", "invalid_json", 400),
    (b"\xff\xfe", "invalid_json", 400),
    ('{"custom_id": 3}', "missing_custom_id", 400),
    (line("twice"), "duplicate_custom_id", 400),
    (line("field", temprature=1), "unknown_field", 400),
    (line("type", temperature="hot"), "invalid_request", 400),
    (line("url", url="/v1/images"), "invalid_url", 404),
    (line("model", model="gpt-4"), "model_not_found", 404),
    (line("long", prompt="x" * 101), "invalid_request", 400),
    (line("empty", prompt=""), "invalid_request", 400),
    (line("bug", prompt="crash"), "internal_error", 500),
]


@pytest.mark.parametrize(("bad", "code", "status"), BAD_LINES)
def test_a_bad_line_gets_an_error_and_the_others_their_answers(batch, bad, code, status):
    results = batch([line("twice"), bad, "", line("last")])
    assert batch.done.code == 0
    (error,) = [result for result in results if result["error"]]
    assert (error["error"]["code"], error["error"]["line"]) == (code, 2)
    assert error["response"]["status_code"] == status
    assert error["response"]["body"]["error"]["message"] == error["error"]["message"]
    assert sorted(result["custom_id"] for result in results if not result["error"]) == ["last", "twice"]
    assert "2 answered, 1 refused" in batch.done.err


def test_a_second_run_answers_nothing_again(batch, fake_llm):
    lines = [line("a"), "nonsense", line("a"), line("b", url="/v1/x")]
    first = batch(lines)
    assert len(first) == 4
    fake_llm.last = None
    assert batch(lines) == first
    assert fake_llm.last is None, "no model is loaded when nothing is left"
    assert "4 of 4 lines are answered already" in batch.done.err


def test_lines_added_later_are_answered(batch):
    batch([line("a")])
    assert set(by_id(batch([line("a"), line("b")]))) == {"a", "b"}


@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_a_torn_line_is_answered_again_and_only_that(batch, cut):
    lines = [line(f"id-{number}") for number in range(9)]
    whole = batch(lines)
    batch.target.write_bytes(batch.target.read_bytes()[:-cut])
    again = batch(lines)
    assert set(by_id(again)) == {f"id-{number}" for number in range(9)}
    assert again[:8] == whole[:8]


def test_a_failing_engine_loses_no_finished_answer(batch, monkeypatch):
    lines = [line(f"id-{number}") for number in range(20)]
    step = FakeEngine.step

    def failing(self):
        if self.num_steps == 9:
            raise JaxserveError("out of memory")
        return step(self)

    monkeypatch.setattr(FakeEngine, "step", failing)
    options = ["--max-num-seqs", "4"]
    first = batch(lines, *options)
    assert batch.done.code == 2
    assert 0 < len(first) < 20
    monkeypatch.setattr(FakeEngine, "step", step)
    assert set(by_id(batch(lines, *options))) == {f"id-{number}" for number in range(20)}


def test_a_failed_step_ends_the_run_and_what_it_cost_is_answered_by_the_next(batch, monkeypatch):
    lines = [line(f"id-{number}") for number in range(20)]
    step = FakeEngine.step

    def failing(self):
        events = step(self)
        if self.num_steps == 9:
            for event in events:
                event.output.error, event.output.finished = "out of memory", True
        return events

    monkeypatch.setattr(FakeEngine, "step", failing)
    first = batch(lines, "--max-num-seqs", "4")
    assert (batch.done.code, len(first)) == (2, 8)
    assert "jaxserve: out of memory" in batch.done.err
    monkeypatch.setattr(FakeEngine, "step", step)
    assert set(by_id(batch(lines, "--max-num-seqs", "4"))) == {f"id-{number}" for number in range(20)}


def test_a_job_of_which_one_prompt_is_refused_starts_none(batch, fake_llm):
    results = by_id(batch([line("bad", prompt=[[97], [1] * 101]), line("good")]))
    assert results["bad"]["error"]["code"] == "invalid_request"
    assert body_of(results["good"])["choices"][0]["text"] == "GOOD"
    assert fake_llm.last._engine.aborted == ["r0"]


def test_an_interrupt_says_how_to_go_on(batch, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeEngine, "step", interrupted)
    batch([line("a")])
    assert batch.done.code == 130
    assert "the same command goes on from here" in batch.done.err


def test_the_engine_is_kept_full_but_not_flooded(batch, fake_llm):
    batch([line(f"{number:03}") for number in range(100)], "--max-num-seqs", "4")
    engine = fake_llm.last._engine
    assert engine.max_seen == 8
    assert engine.num_steps == 100 * 3 / 4, "four prompts of three tokens each advance in every step"


def test_served_names_answer_for_the_model(batch):
    (result,) = batch([line("a", model="gpt-4o-mini")], "--served-model-name", "gpt-4o-mini")
    assert body_of(result)["model"] == "gpt-4o-mini"


def test_input_and_output_must_differ(cli, checkpoint, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(line("a") + "\n")
    done = cli("run-batch", "-i", path, "-o", path, "--model", checkpoint)
    assert (done.code, path.read_text()) == (2, line("a") + "\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_with_the_real_engine(checkpoint, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    names = [f"id-{number}" for number in range(60)]
    source.write_text("".join(line(name, max_tokens=40, temperature=0, ignore_eos=True) + "\n" for name in names))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items() if name != "progress"]
    command = [sys.executable, "-m", "jaxserve", "run-batch", "-i", source, "-o", target, "--model", checkpoint, *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for _ in range(2):
        before = target.stat().st_size if target.exists() else 0
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and (not target.exists() or target.stat().st_size <= before + 2000):
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
    assert target.read_text().count("\n") > 0
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    results = by_id([json.loads(text) for text in target.read_text().splitlines()])
    assert set(results) == set(names)
    assert all(body_of(result)["usage"]["completion_tokens"] == 40 for result in results.values())
