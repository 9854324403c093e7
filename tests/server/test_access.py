"""Request ids, the line of each request, and what must never be in any line."""

import asyncio
import io
import json
import logging

import httpx
import pytest
from starlette.responses import StreamingResponse

from jaxserve.server.app import ROUTERS, create_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.logs import logging_to
from tests.server.conftest import serving

SECRET = "xyzzy-plugh-42"
BODY = {"model": "tiny", "prompt": f"def {SECRET}(a, b):", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def logged(engine):
    """A server whose log is kept, with three routes of its own that fail: before, in the middle and in a task."""
    app = create_app(ServerConfig(), ("tiny",), engine)

    @app.post("/fail")
    async def fail() -> None:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(f"cannot read {SECRET!r}\n") from error

    @app.post("/fail-later")
    async def fail_later() -> StreamingResponse:
        async def pieces():
            yield b"one"
            raise ValueError(SECRET)

        return StreamingResponse(pieces())

    @app.post("/fail-alone")
    async def fail_alone() -> str:
        async def alone() -> None:
            raise ValueError(SECRET)

        asyncio.get_running_loop().create_task(alone())
        return "ok"

    stream = io.StringIO()
    with logging_to(stream, form="json"), serving(app) as running:
        yield running, stream


@pytest.fixture
def lines(logged):
    """What was logged since the test began; waits for as many lines as it expects."""
    _, stream = logged
    start = len(stream.getvalue())

    def read(count: int) -> list[dict]:
        for _ in range(500):
            found = stream.getvalue()[start:].splitlines()
            if len(found) >= count:
                break
            asyncio.run(asyncio.sleep(0.01))
        assert len(found) == count, found
        return [json.loads(line) for line in found]

    return read


@pytest.fixture
def client(logged):
    server, _ = logged
    with httpx.Client(base_url=server.url) as made:
        yield made


def test_an_answer_has_one_line_that_says_what_it_took(client, lines):
    asked = BODY | {"client": "team-a", "ignore_eos": True}
    response = client.post("/v1/completions", json=asked, headers={"x-request-id": "mine/1"})
    usage = response.json()["usage"]
    (line,) = lines(1)
    assert response.headers["x-request-id"] == line["request_id"] == "mine/1"
    told = {"level": "info", "method": "POST", "route": "/v1/completions", "client": "team-a", "status": 200}
    assert told.items() <= line.items()
    assert (line["prompt_tokens"], line["answer_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert line["finish_reason"] == "length"
    assert 0 < line["first_token_s"] < line["seconds"]


def test_streams_have_ids_of_their_own(client, lines):
    """Their first messages are one and the same object."""
    for name in ("first", "second"):
        response = client.post("/v1/completions", json=BODY | {"stream": True}, headers={"x-request-id": name})
        assert response.headers.get_list("x-request-id") == [name]
    assert [line["request_id"] for line in lines(2)] == ["first", "second"]


def test_a_stream_has_its_line_at_its_end(client, lines):
    with client.stream("POST", "/v1/completions", json=BODY | {"stream": True, "n": 2}) as stream:
        assert stream.headers["x-request-id"]
        stream.read()
    (line,) = lines(1)
    assert line["request_id"] == stream.headers["x-request-id"]
    assert line["answer_tokens"] == 8


def test_who_leaves_early_gets_status_499_and_the_reason_abort(client, lines):
    with client.stream("POST", "/v1/completions", json=BODY | {"stream": True, "max_tokens": 200}) as stream:
        next(stream.iter_lines())
    (line,) = lines(1)
    assert (line["status"], line["finish_reason"]) == (499, "abort")


@pytest.mark.parametrize(
    "bad", ["", "a b", "x" * 129, "é", 'a"b', "a,b", "{}", "<script>", "a\tb"], ids=lambda bad: ascii(bad)[:12]
)
def test_an_id_that_cannot_stand_in_a_log_is_replaced(client, bad, lines):
    response = client.get("/nothing", headers={"x-request-id": bad.encode()})
    made = response.headers["x-request-id"]
    assert made != bad and len(made) == 32 and made.isalnum()
    assert lines(1)[0]["request_id"] == made


def test_names_with_control_characters_stay_within_their_line(client, lines):
    forged = 'a\n{"level":"error","message":"forged"}\r\x1b[2J\u2028'
    client.post("/v1/completions", json=BODY | {"client": forged})
    (line,) = lines(1)
    assert line["client"] == forged


def test_probes_are_logged_only_when_they_change(client, lines, logged, monkeypatch):
    for path in ("/health", "/ready", "/metrics", "/load"):
        assert client.get(path).status_code == 200
    assert lines(0) == []
    with monkeypatch.context() as closing:
        closing.setattr(logged[0].app.state.server, "is_closing", True)
        assert [client.get("/ready").status_code for _ in range(5)] == [503] * 5
    assert [client.get("/ready").status_code for _ in range(5)] == [200] * 5
    assert [client.post("/health").status_code for _ in range(2)] == [405] * 2
    assert [(line["route"], line["status"]) for line in lines(4)] == [
        ("/ready", 503),
        ("/ready", 200),
        ("/health", 405),
        ("/health", 405),
    ]


WRONG = {
    "a wrong type": {"prompt": {SECRET: 1}},
    "an unknown field": {SECRET: 1},
    "an unknown model": {"model": SECRET},
    "a number that is a text": {"temperature": SECRET},
    "a range": {"temperature": -1},
    "no stop string": {"stop": [SECRET, ""]},
    "too long": {"prompt": SECRET * 5000},
    "a bias": {"logit_bias": {SECRET: 1}},
    "a grammar": {"structured_outputs": {"regex": f"({SECRET}"}},
    "a task": {"echo": SECRET},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_mistakes_are_logged_without_what_was_said(client, logged, change):
    response = client.post("/v1/completions", json=BODY | change)
    assert 400 <= response.status_code < 500
    assert SECRET not in logged[1].getvalue()


def test_no_route_logs_or_counts_what_it_was_sent(client, logged):
    """Each route of the app, with the secret in its path, query, headers and body, as JSON, as a form, and broken."""
    server, stream = logged
    routes = [*server.app.routes, *(route for router in ROUTERS for route in router.routes)]
    paths = {route.path: sorted(route.methods) for route in routes if hasattr(route, "methods")}
    message = {"role": "user", "content": SECRET}
    fields = BODY | {"messages": [message], "input": SECRET, "text_1": SECRET, "text_2": SECRET}
    bodies = [
        json.dumps(fields),
        json.dumps({"model": "tiny", "messages": [message]}),
        f'{{"prompt": "{SECRET}',
        SECRET,
    ]
    for path, methods in paths.items():
        where = path.replace("{", "").replace("}", "").replace("name", SECRET)
        for method in set(methods) - {"HEAD"}:
            for body in bodies[: len(bodies) if method == "POST" else 1]:
                headers = {"content-type": "application/json", "x-client": SECRET[:5], "x-secret": SECRET}
                try:
                    client.request(method, f"{where}?q={SECRET}", content=body, headers=headers, timeout=30)
                except (httpx.RemoteProtocolError, httpx.ReadError):  # by how far it had come when it was closed
                    assert path == "/fail-later"
    log = stream.getvalue()
    assert {"/v1/completions", "/metrics", "/fail"} <= paths.keys()
    assert SECRET not in log
    assert SECRET not in client.get("/metrics").text
    assert "ValueError" in log and "test_access.py" in log  # what failed, and where, is told
    failed = [line for line in map(json.loads, log.splitlines()) if line.get("exception")]
    assert all(line["level"] in ("error", "critical") for line in failed)
    bug = next(line for line in failed if line["logger"] == "jaxserve.server.access")
    assert bug["request_id"]
    assert bug["exception"][0] == "ValueError"
    assert "after KeyError" in bug["exception"]


def test_a_bug_is_answered_with_an_error_object_and_the_id(client):
    response = client.post("/fail", headers={"x-request-id": "mine"})
    assert response.status_code == 500
    assert response.headers["x-request-id"] == "mine"
    assert response.json()["error"]["code"] == "internal_error"
    assert SECRET not in response.text


def test_at_level_debug_messages_are_told(logged):
    """The other side of the promise: whoever asks for it sees what failed."""
    server, _ = logged
    stream = io.StringIO()
    with logging_to(stream, level="debug"):
        httpx.post(f"{server.url}/fail")
    assert f"ValueError: cannot read '{SECRET}'" in stream.getvalue()  # all is written when it ends
    assert logging.getLogger("jaxserve").level == logging.INFO  # as it was


def test_requests_can_be_left_out_of_the_log(engine):
    stream = io.StringIO()
    with logging_to(stream), serving(create_app(ServerConfig(log_requests=False), ("tiny",), engine)) as quiet:
        assert httpx.get(f"{quiet.url}/v1/models").status_code == 200
    assert stream.getvalue() == ""
