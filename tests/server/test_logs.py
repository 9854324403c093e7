"""The form of lines."""

import io
import json
import logging
import threading

import pytest

from jaxserve.server.logs import logging_to, request_id, tell

HOSTILE = 'x" level=error\n2026-01-01T00:00:00.000Z ERROR forged\x1b[31m\u2028\u202e\x85'


def logged(form: str, message: str = "told", **fields) -> str:
    stream = io.StringIO()
    with logging_to(stream, form=form):
        tell(logging.getLogger("jaxserve.test"), logging.INFO, message, **fields)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_value_or_message_can_forge_a_line(form):
    line = logged(form, HOSTILE, client=HOSTILE, count=3)
    assert line.endswith("\n") and line.count("\n") == 1
    assert len(line.splitlines()) == 1
    assert line.isascii() and line.rstrip("\n").isprintable()


def test_json_gives_back_what_it_was_given():
    line = json.loads(logged("json", "told", client=HOSTILE, count=3, share=0.5, left_out=None, names=["a", "b"]))
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "jaxserve.test",
        "message": "told",
        "client": HOSTILE,
        "count": 3,
        "share": 0.5,
        "names": ["a", "b"],
    }


def test_text_is_for_people():
    line = logged("text", "ready", model="tiny", route="/v1/completions", name="two words", seconds=1.5)
    assert line.split(" ", 1)[1] == (
        'INFO     jaxserve.test ready model=tiny route=/v1/completions name="two words" seconds=1.5\n'
    )


def test_lines_of_a_request_carry_its_id():
    token = request_id.set("mine")
    try:
        assert "request_id=mine" in logged("text")
    finally:
        request_id.reset(token)


def test_an_exception_is_told_by_its_types_and_places():
    stream = io.StringIO()
    with logging_to(stream):
        try:
            try:
                raise KeyError("secret")
            except KeyError as error:
                raise ValueError("secret too") from error
        except ValueError:
            logging.getLogger("jaxserve.test").exception("it failed")
    lines = stream.getvalue().splitlines()
    assert "secret" not in stream.getvalue()
    assert [line.strip() for line in lines[1:4:2]] == ["ValueError", "after KeyError"]
    assert "test_logs.py" in lines[2]


def test_of_a_library_the_first_line_is_enough():
    stream = io.StringIO()
    with logging_to(stream, form="json"):
        logging.getLogger("asyncio").error("Task exception was never retrieved\nfuture: ValueError('secret')")
        logging.getLogger("uvicorn.error").info("Started server process")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == [
        "Task exception was never retrieved"
    ]


def test_levels_below_the_one_asked_for_are_left_out():
    stream = io.StringIO()
    with logging_to(stream, level="error"):
        logging.getLogger("jaxserve.test").warning("a warning")
    assert stream.getvalue() == ""


def test_a_pipe_that_nobody_reads_costs_lines_and_no_memory(monkeypatch):
    monkeypatch.setattr("jaxserve.server.logs._MOST_LINES", 5)
    stream, gate = io.StringIO(), threading.Event()
    monkeypatch.setattr(stream, "write", lambda text: gate.wait(10) and io.StringIO.write(stream, text))
    with logging_to(stream):
        for number in range(50):
            tell(logging.getLogger("jaxserve.test"), logging.INFO, f"line {number}.")
        gate.set()
    lines = stream.getvalue().splitlines()
    assert 5 <= len(lines) <= 6  # one may be in the writer's hands
    assert lines[0].endswith("line 0.")
