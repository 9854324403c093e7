"""What stands before the routes, with routes that do nothing: no engine is needed."""

import asyncio
import json
import re

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import Response

from jaxserve.openai.fields import MetaFields
from jaxserve.server.app import create_app
from jaxserve.server.caller import meta_of
from jaxserve.server.config import ServerConfig
from jaxserve.server.door import Hosts
from jaxserve.server.json import JsonResponse
from jaxserve.server.sse import EventStream

ADA, BOB = ({"Authorization": f"Bearer sk-{name}"} for name in ("ada", "bob"))


def made(config: ServerConfig) -> FastAPI:
    """The whole app, and routes that end when the test wants it."""
    app = create_app(config, ("tiny",))
    app.state.gate, app.state.closed = asyncio.Event(), []

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        body = await request.body()
        return JsonResponse({"bytes": len(body), "meta": meta_of(request, MetaFields(**json.loads(body or "{}")))})

    @app.post("/wait")
    async def wait(request: Request) -> Response:
        try:
            meta_of(request, MetaFields(**json.loads(await request.body() or "{}")))
            await app.state.gate.wait()
        finally:
            app.state.closed.append("wait")
        return Response(b"done")

    @app.post("/stream")
    async def stream() -> Response:
        async def frames():
            try:
                yield b"data: first\n\n"
                await app.state.gate.wait()
                yield b"data: second\n\n"
            finally:
                app.state.closed.append("stream")

        return EventStream(frames())

    return app


def client_of(app) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("ada: sk-ada\nbob: sk-bob\n")
    return str(path)


def run(work):
    return asyncio.run(work)


def test_without_a_key_everything_but_probes_is_closed(key_file):
    async def work():
        app = made(ServerConfig(api_key_file=key_file))
        paths = {(path, method) for path, methods in app.openapi()["paths"].items() for method in methods}
        paths |= {("/openapi.json", "get"), ("/", "get"), ("/page/main.js", "get")}
        assert len(paths) > 10
        async with client_of(app) as client:
            for path, method in sorted(paths):
                url = re.sub("{.*?}", "x", path)
                is_open = url in ("/health", "/ready", "/") or url.startswith("/page/")
                for headers in ({}, {"Authorization": "Bearer sk-wrong"}, {"X-API-Key": "sk-ada"}):
                    answer = await client.request(method, url, headers=headers)
                    if is_open:
                        assert answer.status_code != 401, url
                    else:
                        assert answer.status_code == 401, (method, url, answer.status_code)
                        assert answer.headers["www-authenticate"] == "Bearer"
                        error = answer.json()["error"]
                        assert error["code"] == "invalid_api_key" and error["type"] == "authentication_error"
                        assert "sk-" not in error["message"]
            for tricky in ("/health/", "/v1/models/health", "/health/../v1/models", "/page", "/nowhere"):
                assert (await client.get(tricky)).status_code == 401, tricky
            assert (await client.get("/v1/models", headers=ADA)).status_code == 200

    run(work())


def test_a_path_before_ours_hides_nothing(key_file):
    async def work():
        app = made(ServerConfig(api_key_file=key_file))
        transport = httpx.ASGITransport(app, root_path="/llm")
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            assert (await client.get("/llm/health")).status_code == 200
            assert (await client.get("/llm/v1/models")).status_code == 401
            assert (await client.get("/llm/v1/models", headers=ADA)).status_code == 200

    run(work())


def test_names_of_one_client_never_mean_things_of_another(key_file):
    async def work():
        async with client_of(made(ServerConfig(api_key_file=key_file, isolate_clients=True))) as client:

            async def meta(headers, **body):
                return (await client.post("/echo", headers=headers, json=body)).json()["meta"]

            said = {"program": "p", "cache_salt": "s"}
            ada, bob = await meta(ADA, **said), await meta(BOB, **said)
            assert (ada["client"], bob["client"]) == ("ada", "bob")
            assert ada["program"] != bob["program"] and ada["namespace"] != bob["namespace"]
            assert await meta(ADA, program="p") != await meta(ADA, program="bob/p")
            assert (await meta(ADA))["namespace"] != (await meta(BOB))["namespace"]
            by_header = await meta(ADA | {"X-Program": "p"}, cache_salt="s")
            assert by_header == ada
            for spoofed in ({"json": {"client": "bob"}}, {"json": {}, "headers": ADA | {"X-Client": "bob"}}):
                answer = await client.post("/echo", **({"headers": ADA} | spoofed))
                assert answer.status_code == 403
                assert answer.json()["error"]["code"] == "wrong_client"

    run(work())


def test_keys_share_the_prefix_cache_unless_clients_are_isolated(key_file):
    async def work():
        async with client_of(made(ServerConfig(api_key_file=key_file))) as client:
            answers = [await client.post("/echo", headers=headers, json={}) for headers in (ADA, BOB)]
            assert all("namespace" not in answer.json()["meta"] for answer in answers)

    run(work())


def test_long_bodies_are_refused_before_they_are_read():
    async def work():
        read = 0

        async def endless():
            nonlocal read
            while True:
                read += 1
                yield b" " * 1000

        async with client_of(made(ServerConfig(max_body_bytes=10_000))) as client:
            assert (await client.post("/echo", content=b" " * 9_998 + b"{}")).json()["bytes"] == 10_000
            for content in (b" " * 10_001, endless()):
                answer = await client.post("/echo", content=content)
                assert answer.status_code == 413
                assert answer.json()["error"]["code"] == "body_too_long"
        assert read == 11, "of a body without a length no more is read than must be to know"

    run(work())


def test_requests_of_a_client_at_a_time_are_bounded(key_file):
    async def work():
        app = made(ServerConfig(api_key_file=key_file, max_concurrency_per_client=2))
        async with client_of(app) as client:
            waiting = [asyncio.create_task(client.post("/wait", headers=ADA)) for _ in range(2)]
            await asyncio.sleep(0.02)
            refused = await client.post("/echo", headers=ADA, json={})
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "concurrency_limit_exceeded"
            assert int(refused.headers["retry-after"]) >= 1
            assert (await client.post("/echo", headers=BOB, json={})).status_code == 200
            assert (await client.get("/v1/models", headers=ADA)).status_code == 200
            app.state.gate.set()
            assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]
            assert (await client.post("/echo", headers=ADA, json={})).status_code == 200
        assert app.state.server.quotas.num_open("ada") == 0

    run(work())


def test_places_are_given_back_when_callers_go_away_and_when_routes_fail(key_file):
    async def work():
        app = made(ServerConfig(api_key_file=key_file, max_concurrency_per_client=1))
        async with client_of(app) as client:
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client.post("/wait", headers=ADA), 0.02)
            assert (await client.post("/echo", headers=ADA, content=b"{")).status_code == 500
            assert (await client.post("/echo", headers=ADA, json={})).status_code == 200

    run(work())


def test_rates_are_told_with_every_answer_and_refusals_say_when(key_file):
    async def work():
        async with client_of(made(ServerConfig(api_key_file=key_file, requests_per_minute=2))) as client:
            answers = [await client.post("/echo", headers=ADA, json={}) for _ in range(3)]
            assert [a.status_code for a in answers] == [200, 200, 429]
            assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == ["1", "0", "0"]
            assert answers[2].json()["error"]["type"] == "rate_limit_error"
            assert 25 <= int(answers[2].headers["retry-after"]) <= 30
            assert (await client.post("/echo", headers=BOB, json={})).status_code == 200

    run(work())


def test_a_request_that_takes_too_long_is_ended_and_told_so():
    async def work():
        app = made(ServerConfig(request_timeout=0.1))
        async with client_of(app) as client:
            answer = await client.post("/wait")
            assert answer.status_code == 504
            assert answer.json()["error"]["code"] == "timeout" and "0.1 s" in answer.json()["error"]["message"]
            streamed = await client.post("/stream")
            assert streamed.status_code == 200
            frames = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
            assert frames[0] == "first" and frames[-1] == "[DONE]"
            assert json.loads(frames[1])["error"]["code"] == "timeout"
            await asyncio.sleep(0.01)
        assert app.state.closed == ["wait", "stream"]

    run(work())


def test_deadlines_end_requests_only_where_the_server_says_so():
    async def work(enforced):
        app = made(ServerConfig(enforce_deadlines=enforced, request_timeout=0.4))
        async with client_of(app) as client:
            begun = asyncio.get_running_loop().time()
            answer = await client.post("/wait", json={"deadline_ms": 50})
            return asyncio.get_running_loop().time() - begun, answer.json()["error"]["message"]

    took_s, message = run(work(True))
    assert 0.04 < took_s < 0.3 and "deadline_ms" in message
    took_s, message = run(work(False))
    assert took_s > 0.35 and "0.4 s" in message


def test_a_server_that_closes_says_so_and_lives():
    async def work():
        app = made(ServerConfig())
        app.state.server.is_closing = True
        async with client_of(app) as client:
            answer = await client.post("/echo", json={})
            assert answer.status_code == 503 and "shutting down" in answer.json()["error"]["message"]
            assert answer.headers["retry-after"]
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/ready")).status_code == 503

    run(work())


SAME = {"Origin": "http://127.0.0.1:8000"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        (SAME, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:9000"}, 403),
        ({"Origin": "https://chat.example.org"}, 200),
        (
            {"Origin": "https://llm.example.org", "Sec-Fetch-Site": "same-origin"},
            200,
        ),  # behind a proxy that changes Host
        (SAME | {"Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
def test_pages_of_other_sites_cannot_ask_through_a_visitors_browser(headers, status):
    async def work():
        async with client_of(made(ServerConfig(cors_allow_origin=["https://chat.example.org"]))) as client:
            answer = await client.post("/echo", json={}, headers=headers)
            assert answer.status_code == status
            is_told = answer.headers.get("access-control-allow-origin")
            assert is_told == ("https://chat.example.org" if "chat" in headers.get("Origin", "") else None)

    run(work())


def test_cors_is_off_by_default_and_preflights_need_no_key(key_file):
    async def work():
        ask = {"Origin": "https://chat.example.org", "Access-Control-Request-Method": "POST"}
        async with client_of(made(ServerConfig(api_key_file=key_file))) as client:
            assert (await client.options("/echo", headers=ask)).status_code == 401
            answer = await client.get("/v1/models", headers=ADA | ask)
            assert "access-control-allow-origin" not in answer.headers
        config = ServerConfig(api_key_file=key_file, cors_allow_origin=["https://chat.example.org"])
        async with client_of(made(config)) as client:
            assert (await client.options("/echo", headers=ask)).status_code == 200
            assert (await client.post("/echo", headers=ask)).status_code == 401

    run(work())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("LOCALHOST", 200),
        ("mine.example", 200),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("[", 403),
    ],
)
def test_a_private_server_answers_to_its_own_names_only(host, status):
    async def work():
        app = Hosts(made(ServerConfig()), ["mine.example"])
        async with client_of(app) as client:
            assert (await client.get("/v1/models", headers={"Host": host})).status_code == status

    run(work())
