"""/stats of a real server."""

import json

import httpx
import pytest

from jaxserve.server.app import create_app
from jaxserve.server.caller import Caller
from jaxserve.server.config import ServerConfig
from tests.server.conftest import serving


def complete(url: str, prompt: str, **fields) -> None:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}
    httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()


def test_a_request_is_listed_with_its_times_and_without_its_words(server):
    complete(server.url, "def secret_sauce(", client="ada")
    response = httpx.get(f"{server.url}/stats")
    figures = response.json()
    row = figures["requests"][0]
    assert (row["kind"], row["client"], row["output_tokens"], row["finish_reason"]) == (
        "completions",
        "ada",
        8,
        "length",
    )
    assert row["arrival_s"] <= row["started_s"] < row["first_token_s"] < row["finished_s"] <= figures["now_s"]
    assert "secret" not in response.text
    assert response.headers["cache-control"] == "no-store"


def test_rates_come_with_the_second_reading(server):
    before = httpx.get(f"{server.url}/stats").json()
    complete(server.url, "import os", max_tokens=24, ignore_eos=True)
    after = httpx.get(f"{server.url}/stats").json()
    assert after["output_tokens_per_s"] > 0
    assert after["now_s"] > before["now_s"]
    assert after["running"] == after["waiting"] == 0


def test_while_the_model_is_loaded_there_is_nothing_to_tell():
    with serving(create_app(ServerConfig(), ("toy",))) as running:
        response = httpx.get(f"{running.url}/stats")
    assert response.status_code == 503
    assert "loaded" in response.json()["error"]["message"]


@pytest.mark.parametrize(("client", "seen"), [("ada", {"ada"}), ("eve", set()), ("", {"ada", "bob"})])
def test_a_key_of_a_client_shows_that_client_only(engine, client, seen):
    app = create_app(ServerConfig(), ("tiny",), engine)

    async def keyed(scope, receive, send):
        """As the keys' middleware does: the key says who it is."""
        if scope["type"] == "http" and scope["path"] == "/stats":
            scope["caller"] = Caller(client)
        await app(scope, receive, send)

    keyed.state = app.state  # pyright: ignore[reportFunctionMemberAccess]
    with serving(keyed) as running:  # pyright: ignore[reportArgumentType]
        for name in ("ada", "bob"):
            complete(running.url, "x", client=name)
        figures = httpx.get(f"{running.url}/stats").json()
    assert {row["client"] for row in figures["requests"]} == seen
    assert json.dumps(figures).count("bob") == ("bob" in seen)
