"""/v1/batches: each line is answered once, behind interactive requests, whatever the file and whenever the server dies."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from jaxserve.errors import DeviceError, UnavailableError
from jaxserve.server.batch_run import Run
from jaxserve.server.lane import LATER, Lane
from jaxserve.server.logs import logging_to
from tests.server.archive import KEYS, begin, client_of, end, line, rows, serving_files, upload

ROOT = Path(__file__).resolve().parents[2]
ENDED = ("in_progress_at", "finalizing_at", "completed_at")


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    with serving_files(engine, tmp_path_factory.mktemp("batches"), max_batch_lines=500) as running:
        yield running


@pytest.fixture(scope="module")
def alice(server):
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def bob(server):
    with client_of(server, "bob") as client:
        yield client


def slow_lines(count, **body):
    """Each takes some hundred steps."""
    return [line(f"id-{number}", max_tokens=200, ignore_eos=True, **body) for number in range(count)]


def test_a_batch_is_answered_as_its_requests_would_be(alice):
    lines = [line(f"id-{number}", logprobs=1) for number in range(6)]
    begun = begin(alice, lines, metadata={"who": "me"})
    assert (begun.object, begun.status, begun.endpoint) == ("batch", "validating", "/v1/completions")
    assert begun.expires_at - begun.created_at == 86400
    done = end(alice, begun)
    assert (done.status, done.errors, done.error_file_id, done.metadata) == ("completed", None, None, {"who": "me"})
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    assert (done.failed_at, done.expired_at, done.cancelling_at, done.cancelled_at) == (None,) * 4
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (6, 6, 0)
    found = rows(alice, done.output_file_id)
    assert set(found) == {f"id-{number}" for number in range(6)}
    for text in lines:
        asked = json.loads(text)
        body = found[asked["custom_id"]]["response"]["body"]
        direct = alice.completions.create(model="tiny", **asked["body"])
        assert body["choices"][0]["text"] == direct.choices[0].text
        assert body["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(
            direct.choices[0].logprobs.token_logprobs, abs=1e-3
        )
    usages = [row["response"]["body"]["usage"] for row in found.values()]
    assert done.usage.input_tokens == sum(usage["prompt_tokens"] for usage in usages)
    assert done.usage.output_tokens == sum(usage["completion_tokens"] for usage in usages)
    output = alice.files.retrieve(done.output_file_id)
    assert (output.purpose, output.filename) == ("batch_output", f"{done.id}_output.jsonl")


def test_lines_whose_bodies_are_wrong_are_errors_beside_the_answers(alice):
    lines = [line("good"), line("field", temprature=1), line("model", model="gpt-4"), line("stream", stream=True)]
    lines.append(line("client", client="bob"))
    lines.append(line("form", guided_regex="(a"))
    done = end(alice, begin(alice, lines))
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 1, 5)
    assert set(rows(alice, done.output_file_id)) == {"good"}
    errors = rows(alice, done.error_file_id)
    told = {
        name: (row["response"]["status_code"], row["error"]["code"], row["error"]["line"])
        for name, row in errors.items()
    }
    assert told == {
        "field": (400, "unknown_field", 2),
        "model": (404, "model_not_found", 3),
        "stream": (400, "unsupported_field", 4),
        "client": (403, "wrong_client", 5),
        "form": (400, "invalid_request", 6),
    }
    assert errors["form"]["error"]["message"] == "guided_regex cannot be used: unclosed group"
    assert "did you mean 'temperature'" in errors["field"]["error"]["message"]


@pytest.mark.parametrize(
    ("content", "code", "number"),
    [
        (b"not json", "invalid_json", 1),
        (b"\xff\xfe\x00\n", "invalid_json", 1),
        (b"\0" * 1000, "invalid_json", 1),
        (b"[" * 100_000, "invalid_json", 1),
        (b"", "empty_file", None),
        (b"\n \n", "empty_file", None),
        ([line("a"), line("b"), line("a")], "duplicate_custom_id", 3),
        ([line("a"), line("b", url="/v1/chat/completions")], "invalid_url", 2),
        ([line("a"), json.dumps({"custom_id": "b", "method": "GET", "url": "/v1/completions", "body": {}})], None, 2),
        ([line("a"), '{"body": {}}'], "missing_custom_id", 2),
        (line("a").encode() + b"\n" + b'"' + b"x" * (5 << 20) + b'"\n' + line("b").encode(), "line_too_long", 2),
        ([line(f"id-{number}") for number in range(501)], "too_many_lines", 501),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_a_file_that_is_no_batch_fails_as_a_whole_and_says_where(alice, content, code, number):
    done = end(alice, begin(alice, content))
    assert (done.status, done.output_file_id, done.error_file_id) == ("failed", None, None)
    assert done.failed_at is not None and done.in_progress_at is None
    (error,) = done.errors.data
    assert (error.code, error.line) == (code or "invalid_request", number)
    assert error.message


def test_what_cannot_be_a_batch_is_refused(alice, bob):
    file = upload(alice, [line("a")])
    right = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
    for wrong in ({"endpoint": "/v1/images"}, {"completion_window": "soon"}, {"completion_window": "31d"}):
        with pytest.raises(openai.BadRequestError) as caught:
            alice.batches.create(**right | wrong)
        assert caught.value.param == next(iter(wrong))
    with pytest.raises(openai.NotFoundError):
        alice.batches.create(**right | {"input_file_id": "../../etc/passwd"})
    with pytest.raises(openai.NotFoundError):
        bob.batches.create(**right)
    with pytest.raises(openai.BadRequestError):
        alice.batches.create(**right, metadata={str(number): "" for number in range(17)})
    done = end(alice, alice.batches.create(**right))
    with pytest.raises(openai.BadRequestError, match="purpose"):
        alice.batches.create(**right | {"input_file_id": done.output_file_id})


def test_nobody_sees_or_cancels_the_batch_of_another(alice, bob):
    batch = begin(alice, slow_lines(4))
    for call in (bob.batches.retrieve, bob.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call(batch.id)
    assert all(each.id != batch.id for each in bob.batches.list())
    done = end(alice, batch)
    assert done.status == "completed"
    with pytest.raises(openai.NotFoundError):
        bob.files.content(done.output_file_id)
    with pytest.raises(openai.ConflictError):
        alice.batches.cancel(batch.id)


def test_batches_are_listed_page_by_page_newest_first(bob):
    begun = [end(bob, begin(bob, [line("a")])).id for _ in range(3)]
    assert [batch.id for batch in bob.batches.list(limit=2)][:3] == begun[::-1]


def test_two_batches_at_once_mix_nothing_up_and_deleting_the_input_does_no_harm(alice, bob):
    batches = {
        client: begin(client, [line(f"{name}-{number}") for number in range(20)])
        for name, client in (("a", alice), ("b", bob))
    }
    for client, batch in batches.items():
        client.files.delete(batch.input_file_id)
    for name, (client, batch) in zip("ab", batches.items(), strict=True):
        done = end(client, batch)
        assert done.status == "completed"
        assert set(rows(client, done.output_file_id)) == {f"{name}-{number}" for number in range(20)}


def test_a_cancelled_batch_gives_what_it_has_and_names_the_rest(alice, engine):
    lines = slow_lines(40)
    batch = begin(alice, lines)
    while alice.batches.retrieve(batch.id).request_counts.completed < 2:
        time.sleep(0.01)
    assert alice.batches.cancel(batch.id).status == "cancelling"
    done = end(alice, batch)
    assert done.status == "cancelled" and done.cancelling_at <= done.cancelled_at
    answered, unanswered = rows(alice, done.output_file_id), rows(alice, done.error_file_id)
    assert 2 <= len(answered) < 40
    assert answered.keys() | unanswered.keys() == {f"id-{number}" for number in range(40)}
    assert not answered.keys() & unanswered.keys()
    assert {row["error"]["code"] for row in unanswered.values()} == {"batch_cancelled"}
    wait_until_idle(engine)


def test_a_batch_that_takes_too_long_expires(alice, engine):
    done = end(alice, begin(alice, slow_lines(300), completion_window="1s"))
    assert done.status == "expired" and done.expired_at >= done.expires_at
    answered, unanswered = rows(alice, done.output_file_id), rows(alice, done.error_file_id)
    assert answered.keys() | unanswered.keys() == {f"id-{number}" for number in range(300)}
    assert {row["error"]["code"] for row in unanswered.values()} == {"batch_expired"}
    wait_until_idle(engine)


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}),
        ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
        ("/v1/score", {"text_1": "def", "text_2": ["def", "class"]}),
        ("/v1/rerank", {"query": "def", "documents": ["class", "def"], "top_n": 1}),
    ],
)
def test_every_endpoint_answers_as_its_route_does(alice, url, body):
    asked = {"custom_id": "one", "method": "POST", "url": url, "body": body}
    done = end(alice, begin(alice, [json.dumps(asked)], endpoint=url))
    ((_, row),) = (rows(alice, done.output_file_id) | rows(alice, done.error_file_id)).items()
    headers = {"authorization": f"Bearer {alice.api_key}"}
    direct = httpx.post(f"{alice.base_url}".removesuffix("/v1/") + url, headers=headers, json=body)
    assert row["response"]["status_code"] == direct.status_code
    fixed = [{**each, "id": "", "created": 0, "usage": 0} for each in (row["response"]["body"], direct.json())]
    assert fixed[0] == fixed[1]


def test_a_server_that_ends_leaves_its_batch_to_the_next(engine, tmp_path):
    lines = slow_lines(16)
    with serving_files(engine, tmp_path) as first, client_of(first) as client:
        batch = begin(client, lines)
        waits = begin(client, [line("late")], completion_window="7d")
        while client.batches.retrieve(batch.id).request_counts.completed < 3:
            time.sleep(0.01)
    wait_until_idle(engine)
    path = tmp_path / "archive" / "batches" / batch.id / "results.jsonl"
    before = path.read_bytes()
    path.write_bytes(before[:-7])  # and the last line was torn
    with serving_files(engine, tmp_path) as second, client_of(second) as client:
        client.models.list()  # no call to batches is needed
        again = end(client, batch)
        assert again.status == "completed" and again.request_counts.completed == 16
        answers = client.files.content(again.output_file_id).content
        assert answers.startswith(before[: before.rindex(b"\n", 0, -1) + 1]), "what was answered is kept as it was"
        assert set(rows(client, again.output_file_id)) == {f"id-{number}" for number in range(16)}
        assert end(client, waits).status == "completed"
        wait_until(lambda: [path.name for path in path.parent.iterdir()] == ["state.json"])


def test_a_failed_step_costs_nothing_but_time_and_an_engine_that_always_fails_ends_the_batch(alice, monkeypatch):
    step, failures = Lane.step, [2]

    def failing(self):
        if failures[0]:
            failures[0] -= 1
            raise DeviceError("out of memory")
        return step(self)

    monkeypatch.setattr(Lane, "step", failing)
    done = end(alice, begin(alice, slow_lines(4)))
    assert (done.status, done.request_counts.completed) == ("completed", 4)
    failures[0] = 1000
    done = end(alice, begin(alice, slow_lines(4)))
    assert (done.status, done.errors.data[0].code) == ("failed", "device_error")
    assert {row["error"]["code"] for row in rows(alice, done.error_file_id).values()} == {"batch_failed"}


@pytest.mark.parametrize("where", [(Lane, "submit"), (Run, "_validate")])
def test_a_bug_of_ours_is_logged_without_what_a_line_has_asked(alice, monkeypatch, capfd, where):
    def wrong(*args, **options):
        raise ValueError("xyzzy-plugh")

    monkeypatch.setattr(*where, wrong)
    log = io.StringIO()
    with logging_to(log):
        end(alice, begin(alice, [line("a")]))
    assert "which is a bug" in log.getvalue() and "ValueError" in log.getvalue()
    assert "xyzzy" not in log.getvalue() + "".join(capfd.readouterr())


def test_batches_stay_behind_and_count_for_their_client(alice, engine):
    seen = []
    engine.listeners.append(seen.append)
    try:
        batch = begin(alice, slow_lines(12, priority=-5))
        most = 0
        while alice.batches.retrieve(batch.id).status not in ("completed", "failed"):
            most = max(most, engine.num_unfinished)
    finally:
        engine.listeners.remove(seen.append)
    requests = [stream.request for stream in seen]
    assert {(request.client, request.priority) for request in requests} == {("alice", LATER - 5)}
    assert len(requests) == 12
    assert 1 <= most <= engine.config.max_num_seqs // 2


def test_batches_wait_for_tokens_and_take_none_from_requests(engine, tmp_path):
    with serving_files(engine, tmp_path, tokens_per_minute=600) as running, client_of(running) as client:
        batch = begin(client, slow_lines(12))  # 2,400 tokens
        quotas = running.app.state.server.quotas
        account = quotas._accounts
        wait_until(lambda: "alice/batches" in account and account["alice/batches"].tokens.level <= 0)
        wait_until_idle(engine)
        assert client.completions.create(model="tiny", prompt="a", max_tokens=2).usage.completion_tokens == 2
        level = account["alice/batches"].tokens.level
        assert level > -1000, "it has stopped: only what was under way is owed"
        assert not account["alice/batches"].streams, "answers that were paid for are not held on to"
        done = client.batches.retrieve(batch.id).request_counts.completed
        assert 0 < done < 12
        assert quotas.wait_s("alice/batches", time.monotonic()) > 0
        quotas.tokens_per_minute = None  # the rest at once
        assert end(client, batch).request_counts.completed == 12


def test_a_batch_waits_for_its_grammars_until_it_is_cancelled(alice, engine, monkeypatch):
    def busy(*args, **options):
        raise UnavailableError("too many grammars wait to be compiled")

    with monkeypatch.context() as patch:
        patch.setattr(engine.intake, "request", busy)
        waits, ends = (begin(alice, [line("a")]) for _ in range(2))
        time.sleep(0.3)
        alice.batches.cancel(ends.id)
        done = end(alice, ends)
        assert (done.status, rows(alice, done.error_file_id)["a"]["error"]["code"]) == ("cancelled", "batch_cancelled")
    assert end(alice, waits).request_counts.completed == 1


def wait_until_idle(engine):
    wait_until(lambda: not engine.num_unfinished)


def wait_until(is_so):
    last_s = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < last_s
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_server_leaves_its_batch_to_the_next(tmp_path):
    """kill -9: no line is lost, and none is answered twice."""
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps(KEYS))
    flags = ["--port=0", f"--files-dir={tmp_path / 'archive'}", f"--api-key-file={keys}", "--max-num-seqs=4"]
    command = [sys.executable, "-m", "jaxserve", "serve", "tiny", *flags, "--max-model-len=256", "--no-progress"]
    names = [f"id-{number}" for number in range(40)]
    batch = None
    for is_last in (False, True):
        log = tmp_path / f"log-{time.monotonic()}"
        with log.open("wb") as file:
            process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=file)
        try:
            url = where(log, process)
            with openai.OpenAI(base_url=f"{url}/v1", api_key=KEYS["alice"]) as client:
                if batch is None:
                    batch = begin(client, slow_lines(40))
                before = client.batches.retrieve(batch.id).request_counts.completed
                if is_last:
                    done = end(client, batch, within_s=120)
                    assert (done.status, done.request_counts.completed) == ("completed", 40)
                    assert set(rows(client, done.output_file_id)) == set(names)
                else:
                    while client.batches.retrieve(batch.id).request_counts.completed < before + 5:
                        time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def where(log, process):
    """The address of a server, once it is ready."""
    while True:
        found = re.search(r"\bready\b.*(http://[0-9.:]+)", log.read_text())
        if found:
            return found[1]
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
