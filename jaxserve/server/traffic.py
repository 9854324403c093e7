"""Traffic: what the server has answered and what is under way, and how late its event loop is."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from jaxserve.histogram import Histogram

NO_ROUTE = "none"  # of a request to a path that nobody serves: paths come from outside, and would be labels
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LATENESS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)  # seconds
_LOOK_EVERY_S = 0.1


class Traffic:
    """Counts of one app, for the thread of its event loop."""

    def __init__(self) -> None:
        self.answered: dict[tuple[str, str, str], int] = {}  # by route, method, status
        self.num_open = 0  # requests under way
        self.num_streams = 0  # of those: streams of server-sent events that have begun
        self.lateness = Histogram(_LATENESS)  # seconds by which the event loop wakes too late

    def ended(self, route: str, method: str, status: int) -> None:
        """A request was answered, or given up."""
        key = route, method if method in _METHODS else "other", str(status)
        self.answered[key] = self.answered.get(key, 0) + 1

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Measure the event loop's lateness meanwhile."""
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait((watching,))

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + _LOOK_EVERY_S
            await asyncio.sleep(_LOOK_EVERY_S)
            self.lateness.add(max(0.0, loop.time() - due_s))
