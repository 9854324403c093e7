"""The ring of the last requests: their times and counts, and nothing of what they say."""

import dataclasses
import json
from typing import Any

from jaxserve.clock import VirtualClock
from jaxserve.errors import UnavailableError
from jaxserve.output import Event
from jaxserve.request import Request
from jaxserve.server.recent import Recent, Row
from jaxserve.stream import Stream
from tests.fakes import PIECES, ask, make_engine


def follow(recent: Recent, request: Request) -> Stream:
    nobody: Any = None  # no loop and no engine: nothing here waits or aborts
    stream = Stream(request, nobody, nobody)
    recent.add(stream)
    return stream


def push(stream: Stream, event: Event) -> None:
    stream.push([event], is_last=event.output.finished)


def test_a_row_follows_its_request_from_the_queue_to_its_end():
    rig = make_engine(num_slots=1)
    recent = Recent(rig.clock, "toy")
    requests = [
        ask(f"chatcmpl-{name}", [1, 2, 3], max_tokens=4, ignore_eos=True, client=name) for name in ("ada", "bob")
    ]
    streams = {}
    for request in requests:
        streams[request.request_id] = follow(recent, request)
        rig.engine.add(request)
    states = []
    while rig.engine.has_work:
        for event in rig.step():
            push(streams[event.request_id], event)
        states.append([(row["finish_reason"], row["output_tokens"]) for row in recent.rows()])
    assert states[-1] == [("length", 4), ("length", 4)]
    assert (None, 0) in [state[0] for state in states]  # bob waits while ada runs
    assert (None, 2) in [state[1] for state in states]
    bob, ada = recent.rows()
    assert (ada["client"], ada["kind"], ada["model"], ada["prompt_tokens"]) == ("ada", "chat", "toy", 3)
    for row in (ada, bob):
        assert row["arrival_s"] <= row["started_s"] < row["first_token_s"] < row["finished_s"]
    assert bob["started_s"] >= ada["finished_s"]


def test_a_row_holds_figures_and_names_only():
    rig = make_engine()
    recent = Recent(rig.clock, "toy")
    request = ask("cmpl-1", [5, 6, 7], max_tokens=3, ignore_eos=True)
    stream = follow(recent, request)
    rig.engine.add(request, "a secret prompt")
    while rig.engine.has_work:
        for event in rig.step():
            push(stream, event)
    (row,) = recent.rows()
    assert set(row) == {field.name for field in dataclasses.fields(Row)}
    assert all(isinstance(value, (str, int, float, type(None))) for value in row.values())
    said = json.dumps(row)
    assert "secret" not in said
    assert not any(piece in said for piece in PIECES[8:] if len(piece) > 2)


def test_what_the_cache_gave_is_told_while_the_answer_grows():
    rig = make_engine()
    rig.run(ask("before", range(1, 10), max_tokens=1))
    recent = Recent(rig.clock, "toy")
    request = ask("cmpl-1", range(1, 10), max_tokens=8, ignore_eos=True)
    stream = follow(recent, request)
    rig.engine.add(request)
    while stream.output is None:
        for event in rig.step():
            push(stream, event)
    (row,) = recent.rows()
    assert row["finish_reason"] is None
    assert row["cached_tokens"] == 8


def test_of_many_requests_the_last_ones_stay():
    recent = Recent(VirtualClock(), "toy", size=4)
    for number in range(10):
        follow(recent, ask(f"cmpl-{number}", [1]))
    assert [row["id"] for row in recent.rows()] == ["cmpl-9", "cmpl-8", "cmpl-7", "cmpl-6"]


def test_a_client_sees_its_own_requests_and_none_of_others():
    recent = Recent(VirtualClock(), "toy")
    for client in ("ada", "bob", "ada", ""):
        follow(recent, ask("cmpl-1", [1], client=client))
    assert [row["client"] for row in recent.rows("ada")] == ["ada", "ada"]
    assert recent.rows("eve") == []
    assert len(recent.rows()) == 4


def test_a_request_that_the_engine_lost_ends_as_an_error():
    recent = Recent(VirtualClock(3.0), "toy")
    follow(recent, ask("cmpl-1", [1])).fail(UnavailableError("gone"))
    (row,) = recent.rows()
    assert (row["finish_reason"], row["finished_s"], row["first_token_s"]) == ("error", 3.0, None)


def test_what_has_ended_is_let_go_of():
    """A stream holds the prompt and the answer; a row outlives it."""
    rig = make_engine()
    recent = Recent(rig.clock, "toy")
    request = ask("cmpl-1", [1, 2], max_tokens=2)
    stream = follow(recent, request)
    rig.engine.add(request)
    while rig.engine.has_work:
        for event in rig.step():
            push(stream, event)
    before = recent.rows()
    stream.output.metrics.num_cached_tokens = 99  # whoever still looked at it would see this
    assert recent.rows() == before


def test_answers_of_one_request_are_counted_together():
    rig = make_engine()
    recent = Recent(rig.clock, "toy")
    request = ask("resp_1", [1, 2], n=2, max_tokens=3, ignore_eos=True, temperature=1.0)
    stream = follow(recent, request)
    rig.engine.add(request)
    while rig.engine.has_work:
        for event in rig.step():
            push(stream, event)
    (row,) = recent.rows()
    assert (row["output_tokens"], row["finish_reason"], row["kind"]) == (6, "length", "responses")
