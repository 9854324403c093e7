"""Spans, as a collector gets them."""

import gzip
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from tests.server.conftest import serving

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY = {"model": "tiny", "prompt": "def add(a, b):", "max_tokens": 5, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def collector():
    """A collector of this machine: its address, and the spans it got."""
    proto = pytest.importorskip(
        "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="needs pip install 'jaxserve[otel]'"
    )
    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in proto.ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend((resource.resource, span) for span in scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()
        thread.join()


def attributes(span) -> dict:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_each_request_is_a_span_of_the_callers_trace(engine, collector):
    endpoint, spans = collector
    began_s = time.time()
    with serving(create_app(ServerConfig(otlp_traces_endpoint=endpoint), ("tiny",), engine)) as running:
        url = f"{running.url}/v1/completions"
        asked = httpx.post(url, json=BODY, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}).json()
        httpx.post(
            url, json=BODY | {"prompt": ["ab", "cd"], "n": 2, "stream": True}, headers={"traceparent": "nonsense"}
        )
        httpx.post(url, json={"prompt": 1})  # no request to the engine, no span
        httpx.get(f"{running.url}/metrics")
    assert len(spans) == 3
    resource, span = spans[0]
    assert resource.attributes[0].key and "jaxserve" in str(resource)
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("llm_request", TRACE, PARENT)
    assert began_s < span.start_time_unix_nano / 1e9 < span.end_time_unix_nano / 1e9 < time.time()
    told = attributes(span)
    assert told["gen_ai.request.id"] == asked["id"]
    assert told["gen_ai.usage.prompt_tokens"] == asked["usage"]["prompt_tokens"]
    assert told["gen_ai.usage.completion_tokens"] == told["gen_ai.request.max_tokens"] == 5
    assert (told["gen_ai.response.model"], told["gen_ai.request.n"], told["http.response.status_code"]) == (
        "tiny",
        1,
        200,
    )
    phases = [told[f"gen_ai.latency.time_in_{name}"] for name in ("queue", "model_prefill", "model_decode")]
    assert sum(phases) == pytest.approx(told["gen_ai.latency.e2e"])
    assert told["gen_ai.latency.e2e"] == pytest.approx(
        (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9, abs=1e-5
    )
    assert [attributes(span)["gen_ai.usage.completion_tokens"] for _, span in spans[1:]] == [10, 10]
    assert all(span.trace_id.hex() != TRACE for _, span in spans[1:])
    assert "add" not in str(spans)  # no prompt


def test_without_the_libraries_one_sentence_says_what_to_install():
    script = (
        "import sys; sys.modules['opentelemetry.sdk'] = None; sys.modules['opentelemetry.exporter'] = None\n"
        "from jaxserve.server.app import create_app\n"
        "from jaxserve.server.config import ServerConfig\n"
        "create_app(ServerConfig(), ('tiny',))\n"  # nothing is imported unless asked for
        "try: create_app(ServerConfig(otlp_traces_endpoint='http://127.0.0.1:1'), ('tiny',))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.startswith("ConfigError traces need a package that is not installed (opentelemetry")
    assert "pip install 'jaxserve[otel]'" in told
