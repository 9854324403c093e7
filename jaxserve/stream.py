"""Stream: what comes of one request, waiting for its consumer."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from jaxserve.errors import JaxserveError
from jaxserve.output import Event, RequestOutput
from jaxserve.request import Request


class Pace(NamedTuple):
    """How often a stream's consumer wants news. The first ones and the last always come at once."""

    num_events: int = 1  # so many together, or more
    delay_s: float = 0.0  # most seconds that news wait for the next ones; they do while very many streams are open


WHOLE = Pace(num_events=sys.maxsize)  # for who wants the whole answer


class Stream:
    """The events of one request, for one consumer on one event loop. `async for event in stream`, or `take` in a loop.

    Events are what they were when they were made; their `output` is the engine's own, and may have gone on since.
    Who leaves early calls `abort`, or the request runs to its end for nobody.
    """

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop, abort: Callable[[str, int | None], None]):
        self.request = request
        self.loop = loop
        self.output: RequestOutput | None = None  # from the first event on
        self.is_ended = False  # no more events will come
        self.pace = Pace()
        self._abort = abort
        self._events: list[Event] = []
        self._failure: JaxserveError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def request_id(self) -> str:
        """Of the request."""
        return self.request.request_id

    async def take(self) -> list[Event]:
        """Wait until there are events, and take all; none are left when the list is empty.

        Raises:
          RequestError, UnavailableError: the engine did not take the request, or has failed.
          RuntimeError: another task waits already.
        """
        if self._waiter is not None:
            raise RuntimeError("a stream has one consumer, and another task waits for it already")
        while not self._events and not self.is_ended:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        if not events and self._failure is not None:
            raise self._failure
        return events

    def abort(self, index: int | None = None) -> None:
        """End the request now, or only its answer `index`. Its last events still come."""
        if not self.is_ended:
            self._abort(self.request_id, index)

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            while events := await self.take():
                for event in events:
                    yield event
        finally:
            self.abort()

    def push(self, events: Sequence[Event], *, is_last: bool) -> None:
        """On the event loop: here are more. Whether they are the last ones, `output` cannot tell: it is ahead of them."""
        self._events += events
        self.output = events[-1].output
        self.is_ended = self.is_ended or is_last
        self._wake()

    def fail(self, failure: JaxserveError) -> None:
        """On the event loop: nothing more will come."""
        if not self.is_ended:
            self._failure, self.is_ended = failure, True
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
