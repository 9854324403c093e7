"""Access: each request gets an id, a line in the log, a place in the counts and, if somebody traces, a span.

The outermost middleware, so that it sees what all others answer. Plain ASGI: what Starlette offers for middleware copies
every piece of a stream through a queue.
"""

import logging
import re
import time
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.openai.errors import ApiError
from jaxserve.openai.ids import new_id
from jaxserve.server.caller import Caller
from jaxserve.server.json import error_response
from jaxserve.server.logs import request_id, tell
from jaxserve.server.traces import Traces
from jaxserve.server.traffic import NO_ROUTE, Traffic
from jaxserve.server.visit import Visit, current
from jaxserve.tally import client_name

_log = logging.getLogger(__name__)

GONE = 499  # nginx's number for a caller who did not wait
_SANE = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
# Asked all day, by machines: logged when what they say changes.
_PROBES = frozenset({"/health", "/ready", "/metrics", "/load", "/stats"})


class Access:
    """See the module."""

    def __init__(self, app: ASGIApp, *, traffic: Traffic, logs: bool = True, traces: Traces | None = None):
        self._app = app
        self._traffic = traffic
        self._level = logging.INFO if logs else logging.DEBUG
        self._traces = traces
        self._told = dict[str, int]()  # by probe: its last status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = Visit(_request_id(scope["headers"]), scope["method"], time.perf_counter())
        current.set(visit)
        request_id.set(visit.request_id)

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = self._begin(visit, message)
            elif not message.get("more_body"):
                visit.is_whole = True
            await send(message)

        self._traffic.num_open += 1
        try:
            await self._app(scope, receive, sent)
        except Exception as error:  # noqa: BLE001  a bug of ours; uvicorn would log its message, and that may quote a prompt
            _log.error("a request has failed, which is a bug", exc_info=error)
            if visit.status:
                raise RuntimeError(f"{type(error).__name__} in the middle of an answer") from None
            await _tell_bug(scope, receive, sent)
        finally:
            self._end(visit, scope)

    def _begin(self, visit: Visit, message: Message) -> Message:
        visit.status = message["status"]
        headers = [(b"x-request-id", visit.request_id.encode()), *message.get("headers", ())]
        visit.is_stream = any(
            name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
        )
        self._traffic.num_streams += visit.is_stream
        return {**message, "headers": headers}  # a new one: all streams begin with the same

    def _end(self, visit: Visit, scope: Scope) -> None:
        visit.has_ended = True
        self._traffic.num_open -= 1
        self._traffic.num_streams -= visit.is_stream
        status = visit.status if visit.is_whole else GONE
        route = getattr(scope.get("route"), "path", NO_ROUTE)
        self._traffic.ended(route, visit.method, status)
        level = logging.DEBUG if route in _PROBES and not self._is_news(route, status) else self._level
        if _log.isEnabledFor(level):
            tell(_log, level, "request", **_fields(visit, scope, route, status))
        if self._traces is not None and visit.streams:
            self._traces.record(visit.streams, scope["headers"], status)

    def _is_news(self, probe: str, status: int) -> bool:
        """Whether a probe says something else than the last time. Mistakes of whoever asks are none of its business."""
        if 400 <= status < 500:
            return True
        before, self._told[probe] = self._told.get(probe, 200), status
        return status != before


def _fields(visit: Visit, scope: Scope, route: str, status: int) -> dict[str, Any]:
    """What the log says of a request. None of what it has asked or was answered."""
    caller: Caller = scope.get("caller") or Caller()
    client = caller.client or (visit.streams[0].request.client if visit.streams else "")
    fields: dict[str, Any] = {
        "method": visit.method,
        "route": route,
        "client": client_name(client) if client else None,
        "status": status,
        "seconds": round(time.perf_counter() - visit.began_s, 6),
    }
    if visit.streams:
        outputs = visit.outputs
        firsts = [
            output.metrics.first_token_s - output.metrics.arrival_s
            for output in outputs
            if output.metrics.first_token_s is not None
        ]
        fields |= {
            "prompt_tokens": sum(len(stream.request.prompt_token_ids) for stream in visit.streams),
            "cached_tokens": sum(output.metrics.num_cached_tokens for output in outputs),
            "answer_tokens": sum(len(answer.token_ids) for output in outputs for answer in output.outputs),
            "first_token_s": round(min(firsts), 6) if firsts else None,
            "finish_reason": visit.finish_reason,
        }
    return fields


async def _tell_bug(scope: Scope, receive: Receive, send: Send) -> None:
    told = ApiError("something went wrong in the server; its log says what", status=500, code="internal_error")
    await error_response(told)(scope, receive, send)


def _request_id(headers: Sequence[tuple[bytes, bytes]]) -> str:
    """The caller's own, if it is one that can stand in a log."""
    for name, value in headers:
        if name == b"x-request-id" and _SANE.fullmatch(value):
            return value.decode()
    return new_id("")
