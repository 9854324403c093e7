"""The soak test itself, in a small version; the long one is run by hand."""

import asyncio
import json
import random
import sys
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import soak
from soaking import callers


def test_a_server_that_breaks_laws_is_found_out(tmp_path):
    """Streams without an end, that go on after it, or that are refused in a strange way."""
    chunk = {"choices": [{"index": 0, "text": "x", "finish_reason": None}]}
    end = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
    for frames, problem in (
        ([chunk, end, "[DONE]"], None),
        ([chunk, end], "no end"),
        ([chunk, "[DONE]"], "ended"),
        ([end, end, "[DONE]"], "after its end"),
        ([chunk, end, "[DONE]", chunk], "follows the end"),
        ([chunk, chunk, end, "[DONE]"], "was answered"),
    ):
        text = "".join(f"data: {f if isinstance(f, str) else json.dumps(f)}\n\n" for f in frames)
        assert (problem is None) == (_stream(tmp_path, text) == "ok"), problem
        if problem is not None:
            assert problem in _stream(tmp_path, text)


def _stream(folder: Path, text: str) -> str:
    class Rng(random.Random):
        def choice(self, seq):
            return seq[0]

    async def work() -> str:
        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": text.encode()})

        server = callers.Server(folder, 1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            caller = callers.Caller(server, client, Rng(0), dict.fromkeys(callers.PROMPTS, "x"))
            try:
                return await callers.stream(caller)
            except AssertionError as error:
                return str(error)

    return asyncio.run(work())


@pytest.mark.slow
def test_ten_seconds_of_mixed_callers_and_a_signal_break_no_law(capsys):
    code = soak.main(["--minutes", "0.17", "--callers", "8"])
    *broken, last = capsys.readouterr().out.strip().splitlines()
    record = json.loads(last)
    assert code == 0 and not broken, broken
    assert record["lives"] == 2 and record["requests"] > 20
    assert record["ends"]["stream"]["ok"] and record["ends"]["nobody"]["ok"] and record["ends"]["wrong"]["ok"]
