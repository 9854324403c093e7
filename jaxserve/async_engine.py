"""AsyncEngine: the engine behind asyncio, for servers and notebooks.

One thread runs the engine and nothing else touches it: what others want of it, they put into its queue. News travel the
other way in one call per step and event loop, whatever the number of requests, and each request's consumer takes from its
own queue whatever has come: who is slow gets larger pieces.
"""

import asyncio
import contextlib
import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from jaxserve import distributed
from jaxserve.build import Built
from jaxserve.config import EngineConfig
from jaxserve.errors import DeviceError, JaxserveError, UnavailableError
from jaxserve.intake import Intake, Prompt, score_of, vectors_of
from jaxserve.output import Event, RequestOutput, Score
from jaxserve.request import Request, SamplingParams, Task
from jaxserve.sampling.grammar import Compiling, without_waiting
from jaxserve.stream import Stream
from jaxserve.tally import Tally
from jaxserve.tokenizer import Tokenizer

T = TypeVar("T")

_WINDOW = 256  # requests of one `finish_all`
_log = logging.getLogger(__name__)


class AsyncEngine:
    """A model, ready to answer any number of tasks at once.

    Takes what `LLM` takes, and `max_requests`: most unfinished requests; `submit` raises UnavailableError beyond that.
    Loading and compiling block; inside of a running event loop use `await AsyncEngine.load(...)`.

        async with await AsyncEngine.load("tiny") as engine:
            async for event in engine.submit("def add(a, b):", SamplingParams(max_tokens=64)):
                print(event.text, end="")

    Raises:
      CheckpointError, ConfigError, CapacityError: the model cannot be loaded or does not fit.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        config: EngineConfig | None = None,
        max_requests: int | None = None,
        **engine_options: Any,
    ):
        if config is not None and engine_options:
            raise TypeError("give either config= or single engine options, not both")
        config = config or EngineConfig(**engine_options)
        self._begin(config, distributed.build(model, config), max_requests)

    @classmethod
    def of(cls, built: Built, *, config: EngineConfig | None = None, max_requests: int | None = None) -> Self:
        """Around an engine that is built already. Nothing else may touch that from here on."""
        made = cls.__new__(cls)
        made._begin(config or EngineConfig(), built, max_requests)
        return made

    def _begin(self, config: EngineConfig, built: Built, max_requests: int | None) -> None:
        self.config = config
        self.max_requests = max_requests
        self._built = built
        self._engine = built.engine
        self.listeners: list[Callable[[Stream], None]] = []  # told of each request that is taken, on its event loop
        cfg = self._built.model
        self.intake = Intake(self._built.tokenizer, cfg.eos_token_ids, self._engine.check, vocab_size=cfg.vocab_size)
        self._streams: dict[str, Stream] = {}  # of unfinished requests; changed under the lock
        self._closed = ""  # why no request is taken any more
        self._lock = threading.Lock()  # between a look at the two above and what follows from it
        self._commands: deque[Callable[[], None]] = deque()
        self._has_news = threading.Event()  # for the engine's thread: a command, or the end
        self._is_leaving = False
        self._has_ended = False  # nobody takes commands any more
        self._thread = threading.Thread(target=self._work, name="jaxserve-engine", daemon=True)
        self._thread.start()

    @classmethod
    async def load(cls, model: str | Path, **options: Any) -> Self:
        """Like the constructor, without blocking the event loop."""
        return await asyncio.to_thread(cls, model, **options)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
          RequestError: the model's folder has none; prompts must be token ids then.
        """
        return self.intake.tokenizer

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._built.max_model_len

    @property
    def embedding_size(self) -> int:
        """Numbers of an embedding."""
        return self._built.model.embed_size

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
        """Why the engine takes no requests any more; empty while it does."""
        return self._closed

    @property
    def window(self) -> int:
        """Most requests that `finish_all` has under way at once, so that one caller's many leave room for others'."""
        return _WINDOW if self.max_requests is None else min(_WINDOW, (self.max_requests + 1) // 2)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        task: Task = Task.GENERATE,
        meta: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> Stream:
        """Queue one prompt. Splits text into tokens on the calling thread; `prepare` does that elsewhere.

        Raises:
          RequestError: the prompt cannot be served.
          UnavailableError: too many requests are unfinished, or the engine is shut down.
        """
        request, text = self.intake.request(
            prompt, params or SamplingParams(), task=task, meta=meta, request_id=request_id
        )
        return self.start(request, text)

    async def prepare(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """Run `work`, mostly a method of `intake`, in another thread: long texts take their time. Where it needs a grammar
        that is not compiled yet, it is run again when that is there."""
        while True:
            try:
                return await asyncio.to_thread(without_waiting, work, *args, **options)
            except Compiling as missing:
                await asyncio.shield(asyncio.wrap_future(missing.done))  # others may wait for the same one

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

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        task: Task = Task.GENERATE,
        meta: Mapping[str, Any] | None = None,
    ) -> RequestOutput:
        """Answer one prompt. Cancelling the call ends the request.

        Raises:
          RequestError, UnavailableError: as `submit`.
          DeviceError: a step failed, mostly for want of memory. The engine goes on.
        """
        made = await self.prepare(self.intake.request, prompt, params or SamplingParams(), task=task, meta=meta)
        return await self.finish(self.start(*made))

    async def finish(self, stream: Stream) -> RequestOutput:
        """Wait for the whole answer of a request. Cancelling the call ends the request.

        Raises:
          DeviceError: a step failed.
        """
        try:
            while await stream.take():
                pass
        finally:
            stream.abort()
        assert stream.output is not None
        if stream.output.error:
            raise DeviceError(stream.output.error)
        return stream.output

    async def score(
        self, prompt: Prompt, continuations: Sequence[Prompt], *, meta: Mapping[str, Any] | None = None
    ) -> list[Score]:
        """Log-probability of each continuation after the prompt; see `LLM.score`."""
        made = await self.prepare(
            lambda: [self.intake.score_request(prompt, continuation, meta=meta) for continuation in continuations]
        )
        outputs = await self.finish_all(made)
        return [score_of(request, output) for (request, _), output in zip(made, outputs, strict=True)]

    async def embed(
        self, prompts: Sequence[Prompt], *, normalize: bool = True, meta: Mapping[str, Any] | None = None
    ) -> np.ndarray:
        """The last token's final hidden state of each prompt; see `LLM.embed`."""
        made = await self.prepare(lambda: [self.intake.embed_request(prompt, meta=meta) for prompt in prompts])
        return vectors_of(await self.finish_all(made), normalize=normalize)

    async def finish_all(self, made: Sequence[tuple[Request, str | None]]) -> list[RequestOutput]:
        """Start requests that `intake` has made, at most `window` at a time, and wait for all. None is left behind.

        Raises:
          UnavailableError, DeviceError: one has failed; the others are ended.
        """
        outputs = list[RequestOutput | None]([None] * len(made))
        todo = enumerate(made)

        async def one_by_one() -> None:
            for number, each in todo:
                outputs[number] = await self.finish(self.start(*each))

        tasks = [asyncio.ensure_future(one_by_one()) for _ in range(min(self.window, len(made)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return [output for output in outputs if output is not None]

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

    async def set_priority(self, request_id: str, priority: float) -> None:
        """Change a request's priority, for scheduling policies that go by it (smaller goes first).

        Raises:
          RequestError: it is no number.
        """
        await self.ask(lambda: self._engine.set_priority(request_id, priority))

    async def end_program(self, program: str) -> None:
        """Say that no more requests of a program will come, so that scheduling policies may forget it."""
        await self.ask(lambda: self._engine.end_program(program))

    async def unpin(self, name: str) -> None:
        """Let the prompt beginnings that requests have pinned under this name be evicted."""
        await self.ask(lambda: self._engine.scheduler.unpin(name))

    async def metrics(self) -> dict[str, Any]:
        """What the engine is and has done; see `LLM.metrics`."""
        return await self.ask(self._built.metrics)

    @property
    def tally(self) -> Tally:
        """What has become of requests. The engine's thread writes it, any may read."""
        return self._engine.tally

    def counts(self) -> dict[str, Any]:
        """`metrics` at once and from any thread, without clients; two values may be a step apart."""
        return self._built.counts()

    def num_running_of(self, client: str) -> int:
        """Answers of a client that are being computed."""
        return self._engine.scheduler.accounts.running(client)

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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self.close)

    # From here on: the engine's thread.

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
            self._on_loop(stream.loop, _fail, {stream: error})

    def _deliver(self, events: Sequence[Event]) -> None:
        """Hand events to the event loops of their consumers, in one call for each loop."""
        by_loop: dict[asyncio.AbstractEventLoop, dict[Stream, list[Event]]] = {}
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is not None:
                by_loop.setdefault(stream.loop, {}).setdefault(stream, []).append(event)
        for loop, by_stream in by_loop.items():
            # Here and not on the loop: it may be closed before it gets to it, and outputs may have gone on by then.
            last = {stream for stream, news in by_stream.items() if news[-1].output.finished}
            self._forget(last)
            self._on_loop(loop, _push, (by_stream, last))

    def _end(self, reason: str) -> None:
        """No step will follow: whoever waits is told so."""
        with self._lock:
            self._closed, self._has_ended = reason, True
        streams = list(self._streams.values())
        self._forget(streams)
        failed: dict[asyncio.AbstractEventLoop, dict[Stream, JaxserveError]] = {}
        for stream in streams:
            failed.setdefault(stream.loop, {})[stream] = UnavailableError(reason)
        for loop, by_stream in failed.items():
            self._on_loop(loop, _fail, by_stream)
        while self._commands:  # questions get an answer; all else has failed already
            with contextlib.suppress(Exception):
                self._commands.popleft()()

    def _on_loop(self, loop: asyncio.AbstractEventLoop, function: Callable[[Any], None], argument: Any) -> None:
        try:
            loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # the loop was closed while its requests were under way: nobody listens any more
            lost = [stream for stream in list(self._streams.values()) if stream.loop is loop]
            self._forget(lost)
            for stream in lost:
                self._engine.abort(stream.request_id)

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


# On the threads of event loops.


def _push(news: tuple[Mapping[Stream, Sequence[Event]], Collection[Stream]]) -> None:
    by_stream, last = news
    for stream, events in by_stream.items():
        stream.push(events, is_last=stream in last)


def _fail(by_stream: Mapping[Stream, JaxserveError]) -> None:
    for stream, error in by_stream.items():
        stream.fail(error)
