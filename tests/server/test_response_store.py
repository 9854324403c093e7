"""Stored responses belong to a client, and there is only so much room."""

import pytest

from jaxserve.openai.messages import FunctionCall, Message, ToolCall
from jaxserve.server.response_store import ResponseStore

SAID = (Message(role="user", content="x" * 1000),)
LONG = "x" * 10_000


def test_nobody_reads_or_deletes_what_is_anothers():
    store = ResponseStore(1 << 20)
    store.put("ada", {"id": "resp-1"}, SAID)
    assert store.get("bob", "resp-1") is None
    assert not store.delete("bob", "resp-1")
    found = store.get("ada", "resp-1")
    assert found is not None
    assert (found.response, found.messages) == (b'{"id":"resp-1"}', SAID)
    assert store.delete("ada", "resp-1")
    assert store.get("ada", "resp-1") is None


def test_the_oldest_make_room_and_the_count_is_kept():
    store = ResponseStore(10_000)
    for number in range(100):
        store.put("ada", {"id": str(number)}, SAID)
    kept = [number for number in range(100) if store.get("ada", str(number))]
    assert kept == [96, 97, 98, 99]
    for number in kept:
        store.delete("ada", str(number))
    assert store._num_bytes == 0


@pytest.mark.parametrize(
    "message",
    [
        Message(role="user", content=LONG),
        Message(role="assistant", content="", reasoning=LONG),
        Message(role="tool", content="", tool_call_id=LONG),
        Message(role="assistant", tool_calls=[ToolCall(function=FunctionCall(name="f", arguments=LONG))]),
        Message(role="assistant", tool_calls=[ToolCall(function=FunctionCall(name="f", arguments={"a": LONG}))]),
        Message(role="assistant", tool_calls=[ToolCall(function=FunctionCall(name=LONG))]),
    ],
)
def test_whatever_makes_a_message_long_counts(message):
    store = ResponseStore(10_000)
    store.put("ada", {"id": "1"}, (message,))
    assert store.get("ada", "1") is None


def test_what_is_too_large_is_not_kept_and_pushes_nobody_out_of_reach_of_the_books():
    store = ResponseStore(100)
    store.put("ada", {"id": "1"}, SAID)
    assert store.get("ada", "1") is None
    assert store._num_bytes == 0
    assert not ResponseStore(0).is_on
