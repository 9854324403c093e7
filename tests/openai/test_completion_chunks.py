"""Frames of /v1/completions that are made in a hurry are those that are made with care."""

import json

import pytest

from jaxserve.openai.completion import Chunks, CompletionBody
from jaxserve.output import CompletionOutput, Event, RequestMetrics, RequestOutput


def event(text, index=0, reason=None):
    outputs = [CompletionOutput(index=number) for number in range(2)]
    output = RequestOutput("r", None, [1, 2], outputs, RequestMetrics(arrival_s=0.0))
    return Event("r", index, text, (7,), reason, output)


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
@pytest.mark.parametrize("text", ["plain", 'a "quoted" \\ text\n', '"text":""', "Zoë 🙂 \u2028", " "])
def test_a_plain_frame(options, text):
    body = CompletionBody.model_validate({"prompt": ["a", "b"], "n": 2, "stream": True, **options})
    chunks = Chunks(body, "cmpl-1", 'a "text":"" model', object())
    for prompt, index in ((0, 0), (1, 1), (1, 1)):
        content = chunks.of(prompt, event(text, index))
        assert content.startswith(b"data: ")
        assert content.endswith(b"\n\n")
        assert content.count(b"\n") == 2
        frame = json.loads(content[6:])
        created = frame.pop("created")
        assert isinstance(created, int)
        assert frame == {
            "id": "cmpl-1",
            "object": "text_completion",
            "model": 'a "text":"" model',
            "choices": [{"index": prompt * 2 + index, "text": text, "logprobs": None, "finish_reason": None}],
        } | ({"usage": None} if options else {})
    last = json.loads(chunks.of(1, event("end", 1, "length"))[6:])
    assert list(last["choices"][0])[:4] == ["index", "text", "logprobs", "finish_reason"]
    assert (last["choices"][0]["index"], last["choices"][0]["text"]) == (3, "end")
    assert chunks.of(0, event("")) == b""
