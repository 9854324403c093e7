"""Long answers are put together beside the event loop, so that nobody's tokens wait for them; short ones at once."""

import threading

import httpx
import pytest

from jaxserve.server.json import JsonResponse

IDS = list(range(5, 1005))
SCORED = {"temperature": 0, "echo": True, "logprobs": 5, "max_tokens": 1}


@pytest.mark.parametrize(
    ("path", "short", "long"),
    [
        ("/v1/completions", SCORED | {"prompt": IDS[:9]}, SCORED | {"prompt": IDS}),
        ("/v1/embeddings", {"input": "a"}, {"input": [[number] for number in IDS[:40]]}),
        ("/v1/score", {"prompt": [5], "continuations": [[6]]}, {"prompt": [5], "continuations": [IDS]}),
    ],
)
def test_long_answers_are_made_in_another_thread(server, monkeypatch, path, short, long):
    threads, render = [], JsonResponse.render

    def watched(self, content):
        threads.append(threading.current_thread().name)
        return render(self, content)

    monkeypatch.setattr(JsonResponse, "render", watched)
    for body in (short, long):
        assert httpx.post(server.url + path, json=body, timeout=30).status_code == 200
    assert len(set(threads)) == 2, threads
