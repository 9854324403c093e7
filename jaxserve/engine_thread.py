"""EngineThread: the one thread that runs an engine, and the books of whose request is whose.

Nothing else touches the engine: what others want of it, they put into a queue. News travel the other way; see `delivery.py`.
"""

import asyncio
import contextlib
import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import TypeVar

from jaxserve.delivery import Delivery
from jaxserve.engine import Engine
from jaxserve.errors import JaxserveError, UnavailableError
from jaxserve.output import Event
from jaxserve.request import Request
from jaxserve.stream import Stream

T = TypeVar("T")

_log = logging.getLogger(__name__)


class EngineThread:
    """Runs from the start to `close`, or until the engine fails."""

    def __init__(self, engine: Engine, max_requests: int | None):
        """`max_requests`: most unfinished ones; `start` raises UnavailableError beyond that."""
        self.listeners: list[Callable[[Stream], None]] = []  # told of each request that is taken, on its event loop
        self._engine = engine
        self.max_requests = max_requests
        self._streams: dict[str, Stream] = {}  # of unfinished requests; changed under the lock
        self._closed = ""  # why no request is taken any more
        self._lock = threading.Lock()  # between a look at the two above and what follows from it
        self._delivery = Delivery(self._lose)
        self._commands: deque[Callable[[], None]] = deque()
        self._has_news = threading.Event()  # for the thread: a command, or the end
        self._is_leaving = False
        self._has_ended = False  # nobody takes commands any more
        self._thread = threading.Thread(target=self._work, name="jaxserve-engine", daemon=True)
        self._thread.start()

    @property
    def num_unfinished(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self._streams)

    @property
    def has_failed(self) -> bool:
        """Whether nothing but a new engine can help."""
        return self._has_ended and not self._is_leaving

    @property
    def failure(self) -> str:
        """Why no request is taken any more; empty while they are."""
        return self._closed

    def start(self, request: Request, text: str | None = None) -> Stream:
        """Queue a request that `intake` has made. `text` of its prompt, only to be handed back with the answer.

        Raises:
          UnavailableError: too many requests are unfinished, or the engine is shut down.
        """
        if not request.arrival_s:  # else its wait for a step to end would be nobody's
            request = dataclasses.replace(request, arrival_s=self._engine.pipeline.now_s())
        stream = Stream(request, asyncio.get_running_loop(), self.abort)
        with self._lock:
            if self._closed:
                raise UnavailableError(self._closed)
            if self.max_requests is not None and len(self._streams) >= self.max_requests:
                raise UnavailableError(f"{len(self._streams)} requests are under way already", remedy="Try again later")
            if request.request_id in self._streams:
                raise ValueError(f"request id {request.request_id!r} is in use")
            self._streams[request.request_id] = stream
            self._tell(lambda: self._add(stream, text))
        for listener in self.listeners:
            listener(stream)
        return stream

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or only its answer `index`; its last events still come. What has ended is ignored."""
        if not self._has_ended:
            self._tell(lambda: self._deliver(self._engine.abort(request_id, index)))

    async def ask(self, question: Callable[[], T]) -> T:
        """Call a function between two steps, on the engine's thread, and wait for what it returns."""
        answer: Future[T] = Future()

        def reply() -> None:
            if not answer.set_running_or_notify_cancel():
                return  # the asker did not wait
            try:
                answer.set_result(question())
            except Exception as error:  # noqa: BLE001  it is the asker's
                answer.set_exception(error)

        with self._lock:
            if self._has_ended:
                raise UnavailableError(self._closed)
            self._tell(reply)
        return await asyncio.wrap_future(answer)

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests and wait for those under way; after `timeout_s`, abort them. Returns whether none was."""
        self._refuse("the engine is shutting down")
        end_s = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        while self._streams:
            if end_s is not None and asyncio.get_running_loop().time() >= end_s:
                for request_id in list(self._streams):
                    self.abort(request_id)
                while self._streams:
                    await asyncio.sleep(0.01)
                return False
            await asyncio.sleep(0.01)
        return True

    def close(self) -> None:
        """Stop the engine's thread. What is under way ends with UnavailableError."""
        self._refuse("the engine is shut down")
        self._is_leaving = True
        self._has_news.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # From here on: the thread.

    def _work(self) -> None:
        """Steps, as long as there is something to do; commands between them."""
        try:
            while not self._is_leaving:
                if not self._engine.has_work:
                    self._has_news.wait()
                self._has_news.clear()
                while self._commands:
                    self._commands.popleft()()
                if self._engine.has_work and not self._is_leaving:
                    events = self._engine.step()
                    began_s = self._engine.pipeline.now_s()
                    self._deliver(events)
                    self._engine.tally.took({"deliver": self._engine.pipeline.now_s() - began_s})
            self._end("the engine is shut down")
        except BaseException as error:  # the books of the engine cannot be trusted any more
            _log.critical("the engine has failed", exc_info=True)
            # Its type only: what it says may quote a prompt, and everybody reads this.
            self._end(f"the engine has failed ({type(error).__name__}); restart it, its log says more")
            if not isinstance(error, Exception):
                raise

    def _add(self, stream: Stream, text: str | None) -> None:
        try:
            self._engine.add(stream.request, text)
        except JaxserveError as error:
            self._forget([stream])
            self._delivery.fail({stream: error})

    def _deliver(self, events: Sequence[Event]) -> None:
        """Send events to their consumers; those of a request's last step are its last ones."""
        news = [(self._streams[event.request_id], event) for event in events if event.request_id in self._streams]
        # Here and not on the loop: it may be closed before it gets to it, and outputs may have gone on by then.
        ended = {stream for stream, event in news if event.output.finished}
        self._forget(ended)
        self._delivery.send(news, ended, self._engine.pipeline.now_s())

    def _lose(self, loop: asyncio.AbstractEventLoop) -> None:
        """End the requests of an event loop that was closed while they were under way."""
        lost = [stream for stream in list(self._streams.values()) if stream.loop is loop]
        self._forget(lost)
        for stream in lost:
            self._engine.abort(stream.request_id)

    def _end(self, reason: str) -> None:
        """No step will follow: whoever waits is told so."""
        with self._lock:
            self._closed, self._has_ended = reason, True
        streams = list(self._streams.values())
        self._forget(streams)
        self._delivery.fail({stream: UnavailableError(reason) for stream in streams})
        while self._commands:  # questions get an answer; all else has failed already
            with contextlib.suppress(Exception):
                self._commands.popleft()()

    def _forget(self, streams: Collection[Stream]) -> None:
        with self._lock:
            for stream in streams:
                self._streams.pop(stream.request_id, None)

    # From here on: any thread.

    def _refuse(self, reason: str) -> None:
        with self._lock:
            self._closed = self._closed or reason

    def _tell(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._has_news.set()
