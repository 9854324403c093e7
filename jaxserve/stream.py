"""Stream: what comes of one request, waiting for its consumer."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from jaxserve.errors import JaxserveError
from jaxserve.output import Event, RequestOutput
from jaxserve.request import Request


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
        self.patience = 1  # events that it takes to wake the consumer; the first and the last ones always do
        self._abort = abort
        self._events: list[Event] = []
        self._has_begun = False  # the first events were taken
        self._failure: JaxserveError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def request_id(self) -> str:
        """Of the request."""
        return self.request.request_id

    async def take(self) -> list[Event]:
        """Wait until there are events, `patience` of them, and take all; none are left when the list is empty.

        Raises:
          RequestError, UnavailableError: the engine did not take the request, or has failed.
          RuntimeError: another task waits already.
        """
        if self._waiter is not None:
            raise RuntimeError("a stream has one consumer, and another task waits for it already")
        while not self._is_due:
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        self._has_begun = True
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
        if self._is_due:
            self._wake()

    def fail(self, failure: JaxserveError) -> None:
        """On the event loop: nothing more will come."""
        if not self.is_ended:
            self._failure, self.is_ended = failure, True
            self._wake()

    @property
    def _is_due(self) -> bool:
        return self.is_ended or len(self._events) >= (self.patience if self._has_begun else 1)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
