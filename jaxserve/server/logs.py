"""Logs: a line for each record, as JSON or for people. What callers have written never gets into them.

Messages of exceptions may quote a prompt, and so may what libraries print after the first line of a message: both are left
out, but at level "debug". Names and values that come from outside are escaped, so that no line can be forged.
"""

import contextlib
import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from typing import Any, TextIO

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
OURS = "jaxserve"
_LONGEST_TRACE = 100  # lines
_LIBRARIES = ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "fastapi")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)  # of the request that is being answered

_PLAIN = re.compile(r"[\w./:@+,\[\]-]+", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def tell(log: logging.Logger, level: int, message: str, **fields: Any) -> None:
    """Log a message of ours with values of its own, which stay apart from it."""
    log.log(level, message, extra={"fields": {name: value for name, value in fields.items() if value is not None}})


@contextlib.contextmanager
def logging_to(
    stream: TextIO | None = None, *, form: str = "text", level: str = "info"
) -> Iterator[Callable[[], None]]:
    """Send all logs of this process to a stream (default: stderr), ours and the libraries'. Yields a function that returns
    when all lines so far are written: for who ends the process.

    A thread of its own writes them: whoever reads a pipe slowly must not stop the event loop.
    """
    lines = SimpleQueue[logging.LogRecord]()
    handler = QueueHandler(lines)  # makes a line of each record, where it was logged
    handler.setFormatter(LineFormatter(form, verbose=level == "debug"))
    writer = QueueListener(lines, logging.StreamHandler(stream or sys.stderr))  # pyright: ignore[reportArgumentType]
    # uvicorn tells of every start and stop, which we do too.
    levels = {"": "WARNING", OURS: level.upper(), "uvicorn": "DEBUG" if level == "debug" else "WARNING"}
    loggers = {logging.getLogger(name): levels.get(name, "NOTSET") for name in ("", OURS, *_LIBRARIES)}
    before = [(log, log.level, log.handlers, log.propagate) for log in loggers]
    for log, its_level in loggers.items():
        log.handlers, log.propagate = [], True
        log.setLevel(its_level)
    logging.getLogger().handlers = [handler]
    writer.start()

    def settle() -> None:
        writer.stop()
        writer.start()

    try:
        yield settle
    finally:
        writer.stop()  # when all is written
        for log, its_level, log.handlers, log.propagate in before:
            log.setLevel(its_level)


class LineFormatter(logging.Formatter):
    """Records as lines. `verbose`: with what may quote prompts."""

    def __init__(self, form: str = "text", *, verbose: bool = False):
        super().__init__()
        self._line: Callable[[Mapping[str, Any]], str] = _as_json if form == "json" else _as_text
        self._verbose = verbose

    def format(self, record: logging.LogRecord) -> str:
        """See logging."""
        is_ours = record.name.partition(".")[0] == OURS
        message = record.getMessage()
        content: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message if is_ours or self._verbose else message.strip().partition("\n")[0],
        }
        if request_id.get() is not None:
            content["request_id"] = request_id.get()
        content |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            content["exception"] = self._exception(record.exc_info[1])
        return self._line(content)

    def _exception(self, error: BaseException) -> list[str]:
        """Types and places of an exception and of those that led to it, the last one first."""
        if self._verbose:
            return "".join(traceback.format_exception(error)).splitlines()
        lines, cause = list[str](), error
        while cause is not None and len(lines) < _LONGEST_TRACE:
            lines.append(type(cause).__name__ if not lines else f"after {type(cause).__name__}")
            frames = traceback.extract_tb(cause.__traceback__)
            lines += [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames)]
            cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
        return lines[:_LONGEST_TRACE]


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"), default=str)  # escapes all but ASCII


def _as_text(content: Mapping[str, Any]) -> str:
    fixed = ("time", "level", "logger", "message", "exception")
    fields = [f"{name}={_shown(value)}" for name, value in content.items() if name not in fixed]
    first = [content["time"], content["level"].upper().ljust(8), content["logger"], content["message"], *fields]
    return "\n    ".join([_CONTROL.sub(_escaped, line) for line in (" ".join(first), *content.get("exception", ()))])


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
