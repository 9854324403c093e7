"""Turnstile: hundreds of requests that come at once must not hold up the tokens of those that are under way."""

import asyncio
from collections import deque


class Turnstile:
    """Lets so many in at each round of the event loop; to read a request and begin it takes a third of a millisecond."""

    def __init__(self, most: int = 8):
        self._most = most
        self._num_in = 0  # in this round
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        """Returns at once, or in a later round, in the order of arrival."""
        loop = asyncio.get_running_loop()
        if self._num_in == self._most:
            self._waiting.append(loop.create_future())
            await self._waiting[-1]
            return
        if not self._num_in:
            loop.call_soon(self._next_round, loop)
        self._num_in += 1

    def _next_round(self, loop: asyncio.AbstractEventLoop) -> None:
        self._num_in = 0
        while self._waiting and self._num_in < self._most:
            waiting = self._waiting.popleft()
            if not waiting.done():  # else its caller has gone
                waiting.set_result(None)
                self._num_in += 1
        if self._num_in:
            loop.call_soon(self._next_round, loop)
