"""Chunks of a chat where events carry several tokens or no text, as they do for slow readers and split characters."""

import json

from jaxserve.openai.chat import ChatBody, Chunks, answer
from jaxserve.openai.turn import Dialect
from jaxserve.output import CompletionOutput, Event, Logprob, RequestMetrics, RequestOutput


def chunks_of(content):
    """What a client reads."""
    return [json.loads(frame.removeprefix("data: ")) for frame in content.decode().split("\n\n") if frame]


def test_log_probabilities_of_each_token_are_told_once():
    body = ChatBody(messages=[{"role": "user", "content": "x"}], logprobs=True)
    turn = body.turn(Dialect())
    whole = CompletionOutput(0, text="abcd", token_ids=[1, 2, 3, 4, 5], finish_reason="stop")
    whole.logprobs = [{token: Logprob(-token / 8, 1, f"<{token}>")} for token in whole.token_ids]
    output = RequestOutput("r", "x", [7], [whole], RequestMetrics(0.0))
    chunks = Chunks(body, turn, "chatcmpl-1", "m")
    told = list[dict[str, object]]()
    # Two tokens at once; one without text, whose log-probability comes with the next text; one at the end without any.
    for text, tokens, reason in (("ab", (1, 2), None), ("", (3,), None), ("cd", (4,), None), ("", (5,), "stop")):
        told += chunks_of(chunks.of(Event("r", 0, text, tokens, reason, output)))
    deltas = [chunk["choices"][0] for chunk in told]
    assert [delta["delta"].get("content") for delta in deltas] == ["", "ab", "cd", None]
    tokens = [[each["token"] for each in (delta["logprobs"] or {"content": []})["content"]] for delta in deltas]
    assert tokens == [[], ["<1>", "<2>"], ["<3>", "<4>"], ["<5>"]]
    assert deltas[-1]["finish_reason"] == "stop"
    at_once = answer(body, turn, "chatcmpl-1", "m", output)["choices"][0]["logprobs"]["content"]
    assert at_once == [each for delta in deltas if delta["logprobs"] for each in delta["logprobs"]["content"]]
