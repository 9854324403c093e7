"""LLM: the synchronous API for notebooks, scripts and batch jobs."""

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxserve import distributed
from jaxserve.config import EngineConfig
from jaxserve.errors import DeviceError, RequestError
from jaxserve.intake import Intake, Prompt, score_of, vectors_of
from jaxserve.output import Event, RequestOutput, Score
from jaxserve.request import Request, SamplingParams, Task
from jaxserve.tokenizer import Tokenizer


class LLM:
    """A model, ready to answer.

    `model` is "tiny" (bundled), a folder in Hugging Face format, or a hub id. Engine options are the fields of
    `EngineConfig`, given as keywords or as one `config`. Calls from several threads take turns; a call that fails or is
    interrupted takes its own requests back and leaves the engine usable.

    Raises:
      CheckpointError, ConfigError, CapacityError: the model cannot be loaded or does not fit.
    """

    def __init__(self, model: str | Path, *, config: EngineConfig | None = None, **engine_options: Any):
        if config is not None and engine_options:
            raise TypeError("give either config= or single engine options, not both")
        self.config = config or EngineConfig(**engine_options)
        self._built = distributed.build(model, self.config)
        self._engine = self._built.engine
        cfg = self._built.model
        self._intake = Intake(self._built.tokenizer, cfg.eos_token_ids, self._engine.check, vocab_size=cfg.vocab_size)
        self._lock = threading.RLock()
        self._inboxes: dict[str, deque[Event]] = {}  # of unfinished requests: where their events go
        self._submitted: deque[Event] = deque()  # the inbox of all that came by `submit`

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._built.max_model_len

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
          RequestError: the model's folder has none; prompts must be token ids then.
        """
        return self._intake.tokenizer

    @property
    def embedding_size(self) -> int:
        """Numbers of an embedding."""
        return self._built.model.embed_size

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        meta: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts, all batched together; results in the order of the prompts.

        A prompt is text, token ids, or {"prompt": text} / {"prompt_token_ids": ids}. `params` is one for all, or one per
        prompt. `meta` sets fields of every `Request`: priority, client, program, parents, stage,
        deadline_s, pin, pin_tokens.

        Raises:
          RequestError: a prompt cannot be served; then none is started.
          DeviceError: a step failed, mostly for want of memory. The engine can be used again at once.
        """
        batch = _as_batch(prompts)
        each = _per_prompt(params, len(batch))
        requests = [self._intake.request(prompt, p, meta=meta) for prompt, p in zip(batch, each, strict=True)]
        return self._run(requests, progress=progress)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, meta: Mapping[str, Any] | None = None
    ) -> Iterator[str]:
        """Answer one prompt, yielding text as it comes. Leaving the loop early ends the request."""
        self.tokenizer  # noqa: B018  text is what is streamed: fail before anything runs
        for event in self.stream_events(prompt, params, meta=meta):
            if event.text:
                yield event.text

    def stream_events(
        self, prompt: Prompt, params: SamplingParams | None = None, *, meta: Mapping[str, Any] | None = None
    ) -> Iterator[Event]:
        """Like `stream`, with token ids, answer index, and the growing RequestOutput; for n > 1 and token-only models."""
        request, text = self._intake.request(prompt, params or SamplingParams(), meta=meta)
        yield from self._drive([(request, text)])

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several: lists of {"role": ..., "content": ...}."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        if not conversations:
            raise RequestError("there are no messages")
        prompts = [self.chat_prompt(c, **(chat_template_kwargs or {})) for c in conversations]
        return self.generate(prompts, params, progress=progress)

    def chat_prompt(self, messages: Any, /, **variables: Any) -> dict[str, Any]:
        """A conversation as a prompt for `generate` or `stream`."""
        return self._intake.chat_prompt(messages, **variables)

    def score(self, prompt: Prompt, continuations: Sequence[Prompt]) -> list[Score]:
        """Log-probability of each continuation after the prompt, which is computed once and shared.

        Text is split as evaluation harnesses do: spaces at the end of the prompt belong to the continuation, and
        prompt + continuation is tokenised as a whole.
        """
        requests = [self._intake.score_request(prompt, continuation) for continuation in continuations]
        return [score_of(request, output) for (request, _), output in zip(requests, self._run(requests), strict=True)]

    def embed(self, prompts: Prompt | Sequence[Prompt], *, normalize: bool = True) -> np.ndarray:
        """The last token's final hidden state of each prompt, float32[n, e]; of length 1 unless `normalize=False`."""
        requests = [self._intake.embed_request(prompt) for prompt in _as_batch(prompts)]
        return vectors_of(self._run(requests), normalize=normalize)

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        task: Task = Task.GENERATE,
        meta: Mapping[str, Any] | None = None,
    ) -> str:
        """Queue one prompt and return its request id; `step` runs it and brings its events.

        For servers and batch jobs, which start requests while others run:

            names = {llm.submit(prompt): prompt for prompt in prompts}
            while llm.has_work:
                for event in llm.step():
                    print(names[event.request_id], event.text, event.finish_reason)

        Raises:
          RequestError: the prompt cannot be served.
        """
        request, text = self._intake.request(prompt, params or SamplingParams(), task=task, meta=meta)
        with self._lock:
            self._engine.add(request, text)
            self._inboxes[request.request_id] = self._submitted
        return request.request_id

    def step(self) -> list[Event]:
        """Run the engine for one step, unless events are there already; returns those of all submitted requests.

        A request that a failed step has cost has finish_reason "error", and says why in `event.output.error`.
        """
        with self._lock:
            self._fill(self._submitted)
            events = list(self._submitted)
            self._submitted.clear()
        return events

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a submitted request, or only its answer `index`; the last events come with the next `step`.

        What has ended already is ignored.
        """
        with self._lock:
            if self._inboxes.get(request_id) is self._submitted:
                self._hand_out(self._engine.abort(request_id, index))

    def set_priority(self, request_id: str, priority: float) -> None:
        """Change the priority of a submitted request, for scheduling policies that go by it (smaller goes first).

        What has ended already is ignored.

        Raises:
          RequestError: it is no number.
        """
        with self._lock:
            self._engine.set_priority(request_id, priority)

    def end_program(self, program: str) -> None:
        """Say that no more requests of a program will come, so that scheduling policies may forget it."""
        with self._lock:
            self._engine.end_program(program)

    def unpin(self, name: str) -> None:
        """Let the prompt beginnings that requests have pinned under this name (`meta={"pin": name, ...}`) be evicted."""
        with self._lock:
            self._engine.scheduler.unpin(name)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to return: a submitted request is unfinished, or has events left."""
        with self._lock:
            return bool(self._submitted) or any(inbox is self._submitted for inbox in self._inboxes.values())

    def metrics(self) -> dict[str, Any]:
        """What the engine is and has done: backend, sizes, start-up seconds, token counts, padding, compilations."""
        return self._built.metrics()

    def _run(self, requests: Sequence[tuple[Request, str | None]], *, progress: bool = False) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        bar = tqdm(total=len(requests), desc="requests", unit="req", disable=not progress)
        with bar:
            for event in self._drive(requests):
                if event.output.finished and event.request_id not in outputs:  # answers may end together
                    outputs[event.request_id] = event.output
                    bar.update()
        return [outputs[request.request_id] for request, _ in requests]

    def _drive(self, requests: Sequence[tuple[Request, str | None]]) -> Iterator[Event]:
        """Run the engine until these requests are done. Whoever leaves early takes their requests along."""
        left = {request.request_id: request.params.n for request, _ in requests}  # answers that have not ended
        inbox: deque[Event] = deque()
        try:
            with self._lock:
                for request, text in requests:
                    self._engine.add(request, text)
                    self._inboxes[request.request_id] = inbox
            while left:
                self._fill(inbox)
                while inbox:
                    event = inbox.popleft()
                    if event.output.error:
                        raise DeviceError(event.output.error)
                    if event.finish_reason:  # not `output.finished`: another thread's step may be ahead of this event
                        left[event.request_id] -= 1
                        if not left[event.request_id]:
                            del left[event.request_id]
                    yield event
        finally:
            with self._lock:
                for request, _ in requests:
                    self._hand_out(self._engine.abort(request.request_id))

    def _fill(self, inbox: deque[Event]) -> None:
        """Run the engine for one step, unless events are there already: another caller's step may have brought them."""
        with self._lock:
            if not inbox:
                with _interrupts_between_steps():
                    self._hand_out(self._engine.step())

    def _hand_out(self, events: Sequence[Event]) -> None:
        for event in events:
            self._inboxes[event.request_id].append(event)
        for event in events:  # only now: of answers that end together, each says that the request is finished
            if event.output.finished:
                self._inboxes.pop(event.request_id, None)


@contextlib.contextmanager
def _interrupts_between_steps() -> Iterator[None]:
    """Let Ctrl-C wait for the end of a step, so that the engine's books are never left half written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    try:
        before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    except ValueError:  # an embedding without signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


def _as_batch(prompts: Any) -> list[Any]:
    """One prompt or several -> several."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    batch = list(prompts)
    is_one_prompt = bool(batch) and all(isinstance(p, (int, np.integer)) for p in batch)
    return [batch] if is_one_prompt else batch


def _per_prompt(params: Any, count: int) -> list[SamplingParams]:
    each = (
        [params or SamplingParams()] * count if params is None or isinstance(params, SamplingParams) else list(params)
    )
    if len(each) != count:
        raise RequestError(f"there are {count} prompts but {len(each)} sampling params")
    if not all(isinstance(p, SamplingParams) for p in each):
        raise RequestError("params must be SamplingParams, or a list of them")
    return each
