"""Long answers are put together beside the event loop, so that nobody's tokens wait for them; short ones at once."""

import threading

import httpx
import pytest

from jaxserve.openai.envelope import dumps, dumps_in_pieces
from jaxserve.server.json import JsonResponse, LongJsonResponse
from tests.support.turns import turns_during

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
    threads = []

    def watch(kind, render):
        def watched(self, content):
            threads.append((kind, threading.current_thread().name))
            return render(self, content)

        monkeypatch.setattr(kind, "render", watched)

    watch(JsonResponse, JsonResponse.render)
    watch(LongJsonResponse, LongJsonResponse.render)
    for body in (short, long):
        assert httpx.post(server.url + path, json=body, timeout=30).status_code == 200
    (short_by, loop), (long_by, other) = threads
    assert (short_by, long_by, loop == other) == (JsonResponse, LongJsonResponse, False)


@pytest.mark.parametrize(
    "content",
    [
        {"a": [], "b": {}, "c": None, "d": "ü\u2028", "e": [[], [{}], [None, {"f": 1.5}]], 'g"': {"h": [True]}},
        {"data": [{"index": index, "embedding": [index / 7] * 9000} for index in range(3)]},
        [None, {"x": -1.0}, {"x": -2.0}],
        {"tokens": list(range(10_000)), "token_strs": None},
        [],
        "text",
    ],
)
def test_json_in_pieces_is_the_same(content):
    assert dumps_in_pieces(content) == dumps(content)


def test_json_in_pieces_knows_no_infinity_either():
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps_in_pieces({"a": [float("inf")] * 5000})


def test_json_in_pieces_lets_others_work():
    content = {"data": [{"embedding": [index / 7] * 1000} for index in range(1000)]}
    assert turns_during(lambda: dumps_in_pieces(content)) >= 8
