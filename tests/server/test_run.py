"""From the first signal of life to the last."""

import contextlib
import json
import logging
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import pytest

from jaxserve.cli.main import main
from jaxserve.errors import CheckpointError
from jaxserve.server import run
from jaxserve.server.config import ServerConfig
from jaxserve.server.run import run_server


class FakeEngine:
    """As much of an engine as starting and ending look at."""

    def __init__(self):
        self.listeners = []
        self.intake = SimpleNamespace(reviews=[], has_tokenizer=False)
        self.has_failed, self.failure, self.max_model_len, self.num_unfinished = False, "", 8, 0
        self.log = []

    def counts(self):
        return dict.fromkeys(
            ("backend", "architecture", "dtype", "max_model_len", "num_kv_blocks"), "fake"
        ) | dict.fromkeys(("warm_up_compiles", "load_s", "warm_up_s"), 0)

    async def drain(self):
        self.log.append("drained")

    def close(self):
        self.log.append("closed")


def in_time(condition, seconds=10.0):
    """Wait for what another thread or process does."""
    end_s = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.02)
    return found


def while_serving(load, work, monkeypatch, **options):
    """Run a server in this thread, the only one that gets signals, and `work(url)` in another."""
    said, failures, has_ended = [], [], []
    log, handler = logging.Logger("test"), logging.Handler()  # noqa: LOG001  nobody else may configure it
    handler.emit = lambda record: said.append(record.getMessage())
    log.addHandler(handler)
    monkeypatch.setattr(run, "_log", log)

    def other():
        try:
            (url,) = in_time(lambda: [text.partition(" on ")[2] for text in said if "listening" in text])
            work(url)
        except BaseException as error:  # noqa: BLE001  it is raised below
            failures.append(error)
        finally:
            # A signal before it is ready would end the tests, too.
            in_time(lambda: has_ended or any(text.startswith("ready") for text in said), 30)
            if not has_ended:
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        run_server(ServerConfig(port=0, **options), ("tiny",), load)
    finally:
        has_ended.append(True)
        thread.join(40)
        if failures:
            raise failures[0]
    return said


def status(url):
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code
    return None


@pytest.fixture
def keeps_signals():
    """SIGTERM that comes after the server has gone must not end the tests."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN, "the server did not give the signal back"
    signal.signal(signal.SIGTERM, before)


def test_the_port_is_open_while_the_model_is_loaded_and_a_signal_ends_it_well(monkeypatch, keeps_signals):
    engine, is_loaded = FakeEngine(), threading.Event()

    def load():
        assert is_loaded.wait(10)
        return engine

    def work(url):
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/ready").status_code == 503
        refused = httpx.post(f"{url}/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "loading"
        assert refused.headers["retry-after"] and refused.headers["x-content-type-options"] == "nosniff"
        assert "server" not in refused.headers
        assert httpx.get(f"{url}/health", headers={"Host": "evil.example"}).status_code == 403
        is_loaded.set()
        in_time(lambda: status(f"{url}/ready") == 200)

    said = while_serving(load, work, monkeypatch)
    assert engine.log == ["drained", "closed"]
    assert [text.split(" on ")[0] for text in said] == ["loading; listening", "ready", "shutting down", "stopped"]


@pytest.mark.parametrize("failure", [CheckpointError("there is no weight"), ZeroDivisionError("a bug")], ids=repr)
def test_a_model_that_cannot_be_loaded_ends_the_server_and_is_told(monkeypatch, keeps_signals, failure):
    def load():
        raise failure

    with pytest.raises(type(failure), match=str(failure)):
        while_serving(load, lambda url: in_time(lambda: status(f"{url}/health") is None), monkeypatch)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_while_loading_ends_it_at_once(monkeypatch, keeps_signals, number, code):
    codes, goes_on = [], threading.Event()

    def load():
        goes_on.wait(10)
        return FakeEngine()

    def exit_with(code):  # the real one would end the tests
        codes.append(code)
        goes_on.set()

    def work(url):
        os.kill(os.getpid(), number)
        in_time(lambda: codes)
        in_time(lambda: status(f"{url}/ready") == 200)

    monkeypatch.setattr(os, "_exit", exit_with)
    said = while_serving(load, work, monkeypatch)
    assert codes == [code] and "stopped while loading" in said


def test_what_is_logged_last_is_written(tmp_path):
    program = """
import sys, time
from jaxserve.server.config import ServerConfig
from jaxserve.server.run import run_server
run_server(ServerConfig(port=0, files_dir=sys.argv[1]), ("tiny",), lambda: time.sleep(60))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "files")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "listening" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert "stopped while loading" in process.stderr.read()
    assert process.returncode == 0


def test_who_listens_to_all_without_a_key_is_warned(monkeypatch, keeps_signals):
    said = while_serving(FakeEngine, lambda url: None, monkeypatch, host="0.0.0.0")
    assert said[0].startswith("whoever reaches")
    said = while_serving(FakeEngine, lambda url: None, monkeypatch, host="0.0.0.0", api_key=["sk-secret"])
    assert not any("whoever" in text or "secret" in text for text in said)


def test_https_with_certificates_of_callers(monkeypatch, keeps_signals, certificate):
    """One authority signs for itself here: the server's certificate is also the one that callers must have."""
    files = {"ssl_certfile": f"{certificate}/one.crt", "ssl_keyfile": f"{certificate}/one.key"}

    def work(url):
        assert url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=f"{certificate}/one.crt")
        context.check_hostname = False  # it is of localhost
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health", verify=context)
        context.load_cert_chain(f"{certificate}/one.crt", f"{certificate}/one.key")
        assert httpx.get(f"{url}/health", verify=context).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url.replace('https', 'http')}/health")

    while_serving(FakeEngine, work, monkeypatch, **files, ssl_ca_certs=f"{certificate}/one.crt")


def test_mistakes_are_told_before_a_model_is_loaded(capsys, tmp_path):
    for options, sentence in (
        (["--api-key-file", f"{tmp_path}/absent"], "absent cannot be read"),
        (["--ssl-certfile", "x"], "needs both ssl_keyfile and ssl_certfile"),
        (["--host", "no-such-host.invalid"], "there is no host"),
        (["--port", "70000"], "from 0 to 65535"),
    ):
        assert main(["serve", "tiny", *options]) == 2
        told = capsys.readouterr().err
        assert sentence in told and told.count("\n") == 1


STREAM = {"prompt": "def add(a, b):", "max_tokens": 1500, "ignore_eos": True, "stream": True}


@pytest.mark.slow
@pytest.mark.parametrize("drain_s", [30, 0.5])
def test_a_real_server_drains_and_cuts_short_what_takes_too_long(drain_s):
    command = [sys.executable, "-m", "jaxserve", "serve", "tiny", "--port", "0", "--no-progress", "--max-num-seqs", "8"]
    process = subprocess.Popen([*command, "--drain-timeout", str(drain_s)], stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stderr.readline, "")
        url = next(line.partition(" on ")[2].split()[0] for line in lines if "ready on" in line)
        with httpx.Client(base_url=url, timeout=60) as client, httpx.Client(base_url=url) as other:
            body = STREAM | {"n": 8, "max_tokens": 200 if drain_s > 1 else 1500}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                frames = answer.iter_lines()
                next(frames)
                process.send_signal(signal.SIGTERM)
                in_time(lambda: status(f"{url}/ready") == 503)
                assert other.get("/health").status_code == 200
                assert "shutting down" in other.post("/v1/completions", json={"prompt": "a"}).json()["error"]["message"]
                data = [line.removeprefix("data: ") for line in frames if line]
        assert data[-1] == "[DONE]"
        if drain_s > 1:
            ends = [json.loads(text)["choices"][0]["finish_reason"] for text in data[:-1]]
            assert ends.count("length") == 8
        else:
            assert json.loads(data[-2])["error"]["code"] == "unavailable"
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


@pytest.mark.slow
def test_a_second_signal_ends_a_real_server_at_once():
    command = [sys.executable, "-m", "jaxserve", "serve", "tiny", "--port", "0", "--no-progress", "--max-num-seqs", "8"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stderr.readline, "")
        url = next(line.partition(" on ")[2].split()[0] for line in lines if "ready on" in line)
        with httpx.stream("POST", f"{url}/v1/completions", json=STREAM | {"n": 8}) as answer:
            next(answer.iter_lines())
            process.send_signal(signal.SIGTERM)
            in_time(lambda: "shutting down" in next(lines))
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == -signal.SIGINT
            assert time.monotonic() - begun < 2
    finally:
        process.kill()
        process.stderr.close()
        process.wait()
