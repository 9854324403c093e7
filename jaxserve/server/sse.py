"""Answers as server-sent events, and requests whose caller may go away."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.errors import JaxserveError
from jaxserve.openai.envelope import DONE, frame
from jaxserve.openai.errors import ApiError, api_error
from jaxserve.stream import Stream

T = TypeVar("T")

_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would wait for more
    ],
}


class EventStream(Response):
    """Sends frames as they come. When the caller goes away, their source is closed and the requests are ended.

    An error before the first frame is told with its status, as if there were no stream; one after it as a frame.
    """

    def __init__(self, frames: AsyncIterator[bytes], requests: Sequence[Stream] = (), *, done: bytes = DONE):
        self.status_code = 200
        self.background = None
        self._frames, self._requests = frames, requests
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        sending = asyncio.ensure_future(self._send(send))
        watching = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                sending.cancel()
            await asyncio.wait((sending,))
            if not sending.cancelled() and sending.exception() is not None:
                raise sending.exception()  # pyright: ignore[reportGeneralTypeIssues]
        finally:
            sending.cancel()
            watching.cancel()
            for request in self._requests:  # here: `frames` may never have begun
                request.abort()

    async def _send(self, send: Send) -> None:
        has_begun = False
        try:
            async for content in self._frames:
                if not has_begun:
                    await send(_START)
                    has_begun = True
                if content:
                    await send({"type": "http.response.body", "body": content, "more_body": True})
        except (ApiError, JaxserveError) as error:
            told = error if isinstance(error, ApiError) else api_error(error)
            if not has_begun:
                raise told from None
            await send({"type": "http.response.body", "body": frame(told.body()), "more_body": True})
        finally:
            await self._frames.aclose()  # pyright: ignore[reportAttributeAccessIssue]  they come from a generator
        if not has_begun:
            await send(_START)
        await send({"type": "http.response.body", "body": self._done, "more_body": False})


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do the work, unless the caller goes away first: then it is cancelled.

    Raises:
      ClientDisconnect: nobody waits for the answer any more.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.wait((working,))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
