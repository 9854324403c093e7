"""How much comes in and how long it may take: bodies, requests per client, time. Pure ASGI.

A request that has passed costs nothing more here: chunks of its answer go straight to the connection, unless there is a
limit of time or of rate; then each is looked at.
"""

import asyncio
import dataclasses
import time
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.openai.envelope import DONE, frame
from jaxserve.openai.errors import ApiError
from jaxserve.server.buckets import Quotas
from jaxserve.server.caller import Caller
from jaxserve.server.config import FORM_BYTES, ServerConfig
from jaxserve.server.door import headers_of
from jaxserve.server.json import error_response

CLOSING = "the server is shutting down; send the request again, to another one or a little later"


@dataclasses.dataclass(slots=True)
class Expiry:
    """Until when a request may take. In the scope as `expiry`, for those who learn more from its body."""

    timeout: asyncio.Timeout
    arrival_s: float  # of the event loop's clock
    reason: str

    def within(self, seconds: float, reason: str) -> None:
        """It must end so many seconds after it came, or earlier."""
        at_s, now = self.arrival_s + seconds, self.timeout.when()
        if now is None or at_s < now:
            self.timeout.reschedule(at_s)
            self.reason = reason


class Gate:
    """Stands behind the door: who has come this far is known."""

    def __init__(self, app: ASGIApp, config: ServerConfig, quotas: Quotas):
        self._app = app
        self._config = config
        self._quotas = quotas
        self._has_rates = bool(config.requests_per_minute or config.tokens_per_minute)
        self._may_expire = bool(config.request_timeout or config.enforce_deadlines)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        if scope["app"].state.server.is_closing:
            told = error_response(ApiError(CLOSING, status=503, code="unavailable"), headers={"connection": "close"})
            return await told(scope, receive, send)
        length = headers_of(scope, (b"content-length",)).get(b"content-length", b"0")
        is_upload = scope["path"].endswith("/v1/files")
        limit = self._config.max_file_bytes + FORM_BYTES if is_upload else self._config.max_body_bytes
        if length.isdigit() and int(length) > limit:
            return await error_response(_too_long(limit))(scope, receive, send)
        client = (scope.get("caller") or Caller()).client
        refusal = self._quotas.enter(client, time.monotonic())
        if self._has_rates:
            send = self._with_rates(client, send)
        if refusal is not None:
            told = ApiError(refusal.message, status=429, code=refusal.code)
            return await error_response(told, wait_s=refusal.wait_s)(scope, receive, send)
        try:
            if self._may_expire:
                return await self._in_time(scope, _counted(receive, limit), send)
            return await self._app(scope, _counted(receive, limit), send)
        finally:
            self._quotas.leave(client, time.monotonic())

    def _with_rates(self, client: str, send: Send) -> Send:
        def counted(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), *self._quotas.headers(client, time.monotonic())]
                message = {**message, "headers": headers}
            return send(message)

        return counted

    async def _in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        seconds, start = self._config.request_timeout, None
        timeout = asyncio.timeout(seconds or None)
        expiry = Expiry(
            timeout,
            asyncio.get_running_loop().time(),
            f"the request took longer than the {seconds:g} s that this server gives it",
        )
        scope["expiry"] = expiry

        def watched(message: Message) -> Awaitable[None]:
            nonlocal start
            if start is None:
                start = message
            return send(message)

        try:
            async with timeout:
                await self._app(scope, receive, watched)
        except TimeoutError:
            if not timeout.expired():
                raise
            told = ApiError(expiry.reason, status=504, code="timeout")
            if start is None:
                await error_response(told)(scope, receive, send)
            elif (b"content-type", b"text/event-stream; charset=utf-8") in start["headers"]:
                await send({"type": "http.response.body", "body": frame(told.body()) + DONE, "more_body": False})
            # Otherwise a half-sent answer ends with its connection, which is how HTTP tells it.


def _counted(receive: Receive, limit: int) -> Receive:
    """Refuses a body that is longer as soon as it is, whatever its headers said."""
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > limit:
            raise _too_long(limit)
        return message

    return counted


def _too_long(limit: int) -> ApiError:
    told = f"the body is longer than {limit} bytes (--max-body-bytes; of files --max-file-bytes)"
    return ApiError(told, status=413, code="body_too_long")
