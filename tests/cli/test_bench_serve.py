"""`jaxserve bench serve` as it is typed, against a server in a thread."""

import asyncio
import json
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time

import pytest

from tests.loadgen.rigs import FakeServer, streamed, text, usage

KEY = "sesame"


def respond(path, body):
    """A small model "m" that wants a key for everything."""
    if path == "/v1/models":
        listed = json.dumps({"object": "list", "data": [{"id": "m"}]}).encode()
        return 200, {"Content-Length": str(len(listed))}, [(0, listed)]
    if body["model"] != "m":
        why = json.dumps({"error": {"message": f"The model `{body['model']}` does not exist."}}).encode()
        return 404, {"Content-Length": str(len(why))}, [(0, why)]
    slow = 30.0 if body.get("user") == "slow" and body["max_tokens"] > 1 else 0.0
    if path == "/v1/chat/completions":
        assert body["messages"][0]["role"] == "user"
    return streamed((0, text("a")), (slow, text("b", "length")), (0, usage(7, 2)))


@pytest.fixture(scope="module")
def server():
    """Its `bodies` are those of all requests so far."""
    fake, ready = FakeServer(respond), threading.Event()

    async def main():
        fake.stop = asyncio.get_running_loop(), asyncio.Event()
        async with fake:
            ready.set()
            await fake.stop[1].wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    ready.wait()
    yield fake
    loop, event = fake.stop
    loop.call_soon_threadsafe(event.set)
    thread.join()


@pytest.fixture
def bench(cli, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(*arguments):
        del server.bodies[:], server.heads[:]
        return cli("bench", "serve", "--base-url", server.url, *arguments)

    return run


def test_a_report_and_a_file(bench, server, tmp_path):
    file = tmp_path / "result.json"
    options = ["--num-prompts=5", "--max-concurrency=2", "--random-input-len=6", "--random-output-len=2"]
    done = bench(*options, "--goodput", "ttft:9000", "tpot:9000", "--save-result", file, "--save-detailed")
    assert done.code == 0, done.err
    assert "5 of 5" in done.out
    facts = json.loads(file.read_text())
    assert (facts["completed"], facts["total_input_tokens"], facts["total_output_tokens"]) == (5, 35, 10)
    assert facts["request_goodput"] == facts["request_throughput"]
    assert (facts["model"], len(facts["ttfts"])) == ("m", 5)
    assert {"mean_ttft_ms", "p99_tpot_ms", "median_itl_ms", "p90_e2el_ms"} <= set(facts)
    assert server.bodies[0] is None  # the list of models
    assert server.bodies[-1]["max_tokens"] == 2
    assert server.bodies[-1]["stream_options"] == {"include_usage": True}
    assert "temperature" not in server.bodies[-1]
    assert all(f"Authorization: Bearer {KEY}" in head for head in server.heads)


def test_options_reach_the_server(bench, server):
    flags = ["--temperature=0", "--top-k=5", "--ignore-eos", '--extra-body={"user": "u"}', "--header=x-one=1"]
    done = bench("--model=m", "--endpoint=/v1/chat/completions", "--num-prompts=1", "--num-warmups=1", *flags)
    assert done.code == 0, done.err
    _, warm_up, measured = server.bodies
    wanted = {"temperature": 0, "top_k": 5, "ignore_eos": True, "user": "u", "model": "m", "max_tokens": 128}
    assert wanted.items() <= measured.items()
    assert len(measured["messages"][0]["content"].split()) == 1024
    assert warm_up["messages"] != measured["messages"]
    assert "x-one: 1" in server.heads[-1]


def test_a_trace_and_a_workload(bench, server, tmp_path):
    trace = tmp_path / "t.jsonl"
    rows = [{"prompt": 5, "output_tokens": 9}, {"prompt": 6, "output_tokens": 3, "client": "c", "arrival_s": 0.1}]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert bench("--dataset-name=trace", "--dataset-path", trace, "--send-meta").code == 0
    assert [body["max_tokens"] for body in server.bodies[-2:]] == [9, 3]
    assert server.bodies[-1]["client"] == "c"
    options = '{"cv": 0}'
    assert bench("--dataset-name=tenants", "--num-prompts=4", "--workload-options", options).code == 0
    assert len(server.bodies) == 1 + 1 + 4
    assert len({body["prompt"] for body in server.bodies[2:]}) == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model=x"], "refuses: HTTP 404, The model `x` does not exist."),
        (["--dataset-name=trace"], "a trace needs --dataset-path FILE"),
        (["--dataset-name=randon"], "unknown dataset 'randon'. Did you mean 'random'?"),
        (["--dataset-path=x"], "--dataset-path is no option of the dataset random"),
        (["--dataset-name=sharegpt", "--dataset-path=missing.json"], "no such file or directory: missing.json"),
        (["--request-rate=0"], "--request-rate 0 must be above 0"),
        (["--request-rate=1", "--burstiness=0"], "--burstiness 0 must be above 0"),
        (["--num-prompts=0"], "--num-prompts must lie between 1 and"),
        (["--max-concurrency=-1"], "--max-concurrency must lie between 1 and"),
        (["--endpoint=/v1/responses"], "--endpoint /v1/responses must be"),
        (["--goodput", "itl:3"], "--goodput itl:3 must be like ttft:500"),
        (["--percentile-metrics=ttft,tbt"], "tbt"),
        (["--metric-percentiles=101"], "must be numbers from 0 to 100"),
        (["--header=x"], "must be like x-name=value"),
        (["--tokenizer=no/such/file"], "--tokenizer no/such/file"),
    ],
)
def test_a_mistake_is_one_sentence(bench, arguments, sentence, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = bench(*arguments)
    assert done.code == 2
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1


def test_nobody_there_is_one_sentence(cli):
    done = cli("bench", "serve", "--base-url", "http://127.0.0.1:9")
    assert (done.code, done.err) == (2, "jaxserve: no server answers at http://127.0.0.1:9 (Connection refused)\n")


def test_an_interrupt_gives_what_there_is(server):
    options = ["--model=m", "--num-prompts=3", '--extra-body={"user": "slow"}', "--random-input-len=2"]
    command = [sys.executable, "-m", "jaxserve", "bench", "serve", "--base-url", server.url, *options]
    del server.bodies[:]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline_s = time.monotonic() + 30
        while len(server.bodies) < 4 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "0 of 3" in out
    assert "cut off" in out
    assert "interrupted; this is what there was so far" in err


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_https(cli, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make, *more], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)

    async def main():
        async with FakeServer(respond) as fake:
            tls = await asyncio.start_server(fake._serve, "127.0.0.1", 0, ssl=context)
            url = f"https://127.0.0.1:{tls.sockets[0].getsockname()[1]}"
            flags = [[], ["--ssl-ca-certs", certificate], ["--insecure"]]
            options = ["--base-url", url, "--num-prompts=1"]
            done = [await asyncio.to_thread(cli, "bench", "serve", *options, *each) for each in flags]
            tls.close()
            return done

    refused, trusted, insecure = asyncio.run(main())
    assert refused.code == 2
    assert "certificate verify failed" in refused.err
    assert (trusted.code, insecure.code) == (0, 0), (trusted.err, insecure.err)
