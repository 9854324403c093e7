"""AsyncEngine: the engine behind asyncio, for servers and notebooks.

A thread of its own runs the engine (`engine_thread.py`). Each request's consumer takes from its own queue whatever has come
(`stream.py`): who is slow gets larger pieces.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from jaxserve import distributed
from jaxserve.build import Built
from jaxserve.config import EngineConfig
from jaxserve.engine_thread import EngineThread
from jaxserve.errors import DeviceError
from jaxserve.intake import Intake, Prompt, score_of, vectors_of
from jaxserve.output import RequestOutput, Score
from jaxserve.request import Request, SamplingParams, Task
from jaxserve.sampling.grammar import Compiling, without_waiting
from jaxserve.stream import WHOLE, Stream
from jaxserve.tally import Tally
from jaxserve.tokenizer import Tokenizer

T = TypeVar("T")

_WINDOW = 256  # requests of one `finish_all`


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
        self._built = built
        cfg = built.model
        self.intake = Intake(built.tokenizer, cfg.eos_token_ids, built.engine.check, vocab_size=cfg.vocab_size)
        self._thread = EngineThread(built.engine, max_requests)

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
    def max_requests(self) -> int | None:
        """Most unfinished requests."""
        return self._thread.max_requests

    @property
    def listeners(self) -> list[Callable[[Stream], None]]:
        """Told of each request that is taken, on its event loop."""
        return self._thread.listeners

    @property
    def num_unfinished(self) -> int:
        """Requests that were taken and have not ended."""
        return self._thread.num_unfinished

    @property
    def has_failed(self) -> bool:
        """Whether nothing but a new engine can help."""
        return self._thread.has_failed

    @property
    def failure(self) -> str:
        """Why the engine takes no requests any more; empty while it does."""
        return self._thread.failure

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
        return self._thread.start(request, text)

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
        stream.pace = WHOLE  # what comes before the end wakes nobody
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
        self._thread.abort(request_id, index)

    async def ask(self, question: Callable[[], T]) -> T:
        """Call a function between two steps, on the engine's thread, and wait for what it returns."""
        return await self._thread.ask(question)

    async def set_priority(self, request_id: str, priority: float) -> None:
        """Change a request's priority, for scheduling policies that go by it (smaller goes first).

        Raises:
          RequestError: it is no number.
        """
        await self.ask(lambda: self._built.engine.set_priority(request_id, priority))

    async def end_program(self, program: str) -> None:
        """Say that no more requests of a program will come, so that scheduling policies may forget it."""
        await self.ask(lambda: self._built.engine.end_program(program))

    async def unpin(self, name: str) -> None:
        """Let the prompt beginnings that requests have pinned under this name be evicted."""
        await self.ask(lambda: self._built.engine.scheduler.unpin(name))

    async def metrics(self) -> dict[str, Any]:
        """What the engine is and has done; see `LLM.metrics`."""
        return await self.ask(self._built.metrics)

    @property
    def tally(self) -> Tally:
        """What has become of requests. The engine's thread writes it, any may read."""
        return self._built.engine.tally

    def counts(self) -> dict[str, Any]:
        """`metrics` at once and from any thread, without clients; two values may be a step apart."""
        return self._built.counts()

    def num_running_of(self, client: str) -> int:
        """Answers of a client that are being computed."""
        return self._built.engine.scheduler.accounts.running(client)

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests and wait for those under way; after `timeout_s`, abort them. Returns whether none was."""
        return await self._thread.drain(timeout_s)

    def close(self) -> None:
        """Stop the engine's thread. What is under way ends with UnavailableError."""
        self._thread.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.to_thread(self.close)
