"""The engine of a server as a batch sees it: a part of it, behind everybody who waits for an answer.

A batch runs in a thread of its own and calls `submit`, `step`, `abort` and `unpin` there, as it would those of `LLM`. All
that touches streams happens on the event loop.
"""

import asyncio
import contextlib
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.async_engine import AsyncEngine
from jaxserve.config import EngineConfig
from jaxserve.errors import JaxserveError, UnavailableError
from jaxserve.intake import Prompt
from jaxserve.openai.ids import new_id
from jaxserve.output import Event
from jaxserve.request import Request, SamplingParams, Task
from jaxserve.stream import WHOLE, Stream
from jaxserve.tokenizer import Tokenizer

REQUEST_PREFIX = "batch-"  # of the ids of its requests
LATER = 1e9  # added to priorities: for policies that go by them, all of a batch is behind all who wait
_WAIT_S = 0.1  # for news, and before asking again for a place
_LONGEST_WAIT_S = 1.0  # before it looks again whether tokens may be used
_UNKNOWN_BUDGET = 512  # tokens of a step, where the engine has chosen by itself


class StoppedError(BaseException):
    """The batch was told to end: `reason` is "cancelled", "expired" or "closing". No fault of the line that meets it."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Share:
    """How much of the engine all batches together may have: a share of its places, and only places nobody else wants."""

    def __init__(self, engine: AsyncEngine, share: float):
        self._engine = engine
        self._most = max(1, int(share * engine.config.max_running))
        self.num_lanes = 0
        self.num_taken = 0  # requests of batches under way

    @property
    def has_company(self) -> bool:
        """Whether anybody waits for an answer."""
        return self._engine.num_unfinished > self.num_taken

    def room(self) -> int:
        """Requests that one batch may have under way now; one, however much others want."""
        others = self._engine.num_unfinished - self.num_taken
        total = min(self._most, self._engine.config.max_running - others)
        return max(1, total // max(1, self.num_lanes))


class Lane:
    """One batch's. `Engine` of jaxserve/batch/flight.py."""

    def __init__(
        self,
        engine: AsyncEngine,
        share: Share,
        loop: asyncio.AbstractEventLoop,
        stop: Callable[[], str],
        wait_s: Callable[[], float],
    ):
        """`stop`: why the batch must end; empty while it need not. `wait_s`, asked on the event loop: seconds until it may
        use tokens again."""
        self._engine = engine
        self._share = share
        self._loop = loop
        self._stop = stop
        self._wait_s = wait_s
        self._news: queue.SimpleQueue[Sequence[Event] | JaxserveError] = queue.SimpleQueue()
        self._streams: dict[str, Stream] = {}  # on the event loop
        self._unread: dict[str, int] = {}  # requests whose prompt is not computed yet: its tokens
        self._tasks = set[asyncio.Task[None]]()

    @property
    def config(self) -> EngineConfig:
        """Of the engine."""
        return self._engine.config

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.max_model_len

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError for a model that has none."""
        return self._engine.tokenizer

    def room(self) -> int:
        """How many requests may be under way now. None more while a step's worth of prompts is to be computed: whoever
        comes now would have to wait until that is done. Beside others, one prompt at a time: each makes a step of theirs
        longer."""
        waiting = sum(list(self._unread.values()))
        most = 1 if self._share.has_company else self.config.max_num_batched_tokens or _UNKNOWN_BUDGET
        return 0 if waiting >= most else self._share.room()

    def check(self) -> None:
        """Raises StoppedError if the batch must end."""
        reason = self._stop()
        if reason:
            raise StoppedError(reason)

    def submit(self, prompt: Prompt, params: SamplingParams, *, task: Task, meta: Mapping[str, Any]) -> str:
        """Queue a prompt. While the engine, or whoever compiles grammars, takes no more it waits for its place.

        Raises:
          RequestError: it can never be served.
          StoppedError: the batch must end.
        """
        meta = {**meta, "priority": LATER + meta.get("priority", 0)}
        options: dict[str, Any] = {"task": task, "meta": meta, "request_id": new_id(REQUEST_PREFIX)}
        while True:
            try:
                request, text = self._engine.intake.request(prompt, params, **options)
                break
            except UnavailableError:
                self.check()
                time.sleep(_WAIT_S)
        self._unread[request.request_id] = len(request.prompt_token_ids)
        self._loop.call_soon_threadsafe(self._begin, request, text)
        return request.request_id

    def step(self) -> Sequence[Event]:
        """Wait for news, not for long.

        Raises:
          StoppedError: the batch must end.
          UnavailableError: the engine is shut down.
        """
        self.check()
        try:
            news = self._news.get(timeout=_WAIT_S)
        except queue.Empty:
            return ()
        if isinstance(news, JaxserveError):
            raise news
        return news

    def abort(self, request_id: str) -> None:
        """End a request."""
        self._loop.call_soon_threadsafe(self._abort, request_id)

    def unpin(self, name: str) -> None:
        """Let a prefix go."""
        asyncio.run_coroutine_threadsafe(self._unpin(name), self._loop)

    # From here on: the event loop.

    def _begin(self, request: Request, text: str | None) -> None:
        if request.request_id not in self._unread:  # aborted while it waited
            return
        wait_s = 0.0 if self._engine.failure else self._wait_s()
        if wait_s:
            self._loop.call_later(min(wait_s, _LONGEST_WAIT_S), self._begin, request, text)
            return
        try:
            stream = self._engine.start(request, text)
        except UnavailableError as error:
            if self._engine.failure:
                self._news.put(error)
            else:
                self._loop.call_later(_WAIT_S, self._begin, request, text)
            return
        self._streams[request.request_id] = stream
        self._share.num_taken += 1
        task = self._loop.create_task(self._follow(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, stream: Stream) -> None:
        """The batch is told when a prompt is computed, and when its answer is there."""
        news: Sequence[Event] = ()
        stream.pace = WHOLE
        try:
            while more := await stream.take():
                if not news:
                    self._unread.pop(stream.request_id, None)
                    self._news.put(())
                news = more
            self._news.put(news)
        except JaxserveError as error:
            self._news.put(error)
        finally:
            self._unread.pop(stream.request_id, None)
            self._streams.pop(stream.request_id, None)
            self._share.num_taken -= 1
            self._wait_s()  # its tokens are paid for, and nobody holds on to it any more

    def _abort(self, request_id: str) -> None:
        self._unread.pop(request_id, None)
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.abort()

    async def _unpin(self, name: str) -> None:
        with contextlib.suppress(UnavailableError):  # with the engine its pins have gone
            await self._engine.unpin(name)
