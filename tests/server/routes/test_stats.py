"""/stats of a real server."""

import httpx

from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from tests.server.conftest import serving


def complete(url: str, prompt: str, key: str = "", **fields) -> None:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, **fields}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()


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


def test_with_keys_a_client_sees_its_own_requests_only(engine, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("ada: one\nbob: two\neve: three\n")
    with serving(create_app(ServerConfig(api_key_file=str(keys)), ("tiny",), engine)) as running:
        complete(running.url, "x", key="one")
        complete(running.url, "x", key="two")
        seen = {}
        for key in ("one", "two", "three"):
            response = httpx.get(f"{running.url}/stats", headers={"authorization": f"Bearer {key}"})
            seen[key] = [row["client"] for row in response.json()["requests"]]
        assert seen == {"one": ["ada"], "two": ["bob"], "three": []}
        assert httpx.get(f"{running.url}/stats").status_code == 401
        assert httpx.get(running.url).status_code == 200  # the page itself holds no data
