"""Many jobs in the engine at once: whenever one is done, the next is started."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from jaxserve.batch.job import Item, Job, Pin
from jaxserve.config import EngineConfig
from jaxserve.errors import DeviceError, JaxserveError, RequestError
from jaxserve.intake import Prompt
from jaxserve.openai.constraint import at_fault
from jaxserve.openai.errors import ApiError
from jaxserve.output import Event, RequestOutput
from jaxserve.request import SamplingParams, Task
from jaxserve.tokenizer import Tokenizer

_log = logging.getLogger(__name__)  # not print: what a line has asked must not get into a server's log

Answer = tuple[int, str | None, dict[str, Any] | ApiError]  # line number, custom_id, body or what is wrong


class Engine(Protocol):
    """What runs the prompts: `LLM`, or the engine of a server as one of its batches sees it."""

    @property
    def config(self) -> EngineConfig:
        """Its options."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError for a model that only knows token ids."""
        ...

    def submit(self, prompt: Prompt, params: SamplingParams, *, task: Task, meta: Mapping[str, Any]) -> str:
        """Queue a prompt, or raise RequestError; returns the request's id."""
        ...

    def step(self) -> Sequence[Event]:
        """Wait for news; there may be none yet. Those that say that a request is finished are never left out."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request."""
        ...

    def unpin(self, name: str) -> None:
        """Let a prefix go."""
        ...


@dataclasses.dataclass(slots=True)
class Started:
    """A job in the engine. `outputs` by the place of the prompt in the job, None until it is answered."""

    number: int
    custom_id: str | None
    job: Job
    outputs: list[RequestOutput | None]


class Flight:
    """Keeps as many prompts in the engine as `room` says each time there is news."""

    def __init__(self, engine: Engine, jobs: Iterator[Item], room: Callable[[], int]):
        self._engine = engine
        self._jobs = jobs
        self._room = room
        self._has_more = True
        self._running: dict[str, tuple[Started, int]] = {}  # request id -> job, and which of its prompts
        self._left: dict[str, int] = {}  # groups that have begun: how many of their prompts have not ended
        self._request_ids: dict[str, list[str]] = {}  # by custom_id, of jobs that may be somebody's parents

    def answers(self) -> Generator[Answer, None, None]:
        """Answers as they are ready. Closing the iterator takes back what is still running.

        Raises:
          DeviceError: a step failed. What it cost is not answered, so that another run answers it.
        """
        try:
            yield from self._refill()
            while self._running or self._has_more:
                for event in self._engine.step():
                    if event.output.finished and event.request_id in self._running:
                        yield from self._land(event.request_id, event.output)
                yield from self._refill()
        finally:
            self._abort(self._running)
            for name in self._left:
                self._engine.unpin(name)

    def _refill(self) -> Iterator[Answer]:
        """Start jobs while there is room; jobs that cannot start are answered at once."""
        while self._has_more and len(self._running) < self._room():
            number, custom_id, job = next(self._jobs, (0, None, None))
            if job is None:
                self._has_more = False
                return
            if isinstance(job, Job):
                job = self._start(number, custom_id, job) or job
            if isinstance(job, ApiError):
                yield number, custom_id, job

    def _start(self, number: int, custom_id: str | None, job: Job) -> ApiError | None:
        self._left = {pin.name: pin.num_members for pin in job.pins if pin is not None} | self._left
        try:
            request_ids = self._submit(job)
        except (ApiError, JaxserveError) as error:
            self._leave(job.pins)
            return error if isinstance(error, ApiError) else at_fault(error, job.work.form)
        except Exception as error:  # noqa: BLE001  one line must not stop the others
            self._leave(job.pins)
            _log.error("a line could not be started, which is a bug", exc_info=error)
            return ApiError(f"{type(error).__name__}: {error}", code="internal_error", status=500)
        started = Started(number, custom_id, job, [None] * len(request_ids))
        self._running |= {request_id: (started, place) for place, request_id in enumerate(request_ids)}
        return None

    def _submit(self, job: Job) -> list[str]:
        """Hand all prompts of a job to the engine, or none of them."""
        meta = dict(job.meta)
        if "parents" in meta:
            meta["parents"] = tuple(id_ for parent in meta["parents"] for id_ in self._request_ids.get(parent, ()))
        request_ids = list[str]()
        try:
            for prompt, pin in itertools.zip_longest(job.work.prompts(), job.pins):
                pinned = meta if pin is None else meta | {"pin": pin.name, "pin_tokens": pin.num_tokens}
                request_ids.append(self._engine.submit(prompt, job.work.params, task=job.work.task, meta=pinned))
        except BaseException:
            self._abort(request_ids)
            raise
        if "program" in meta:
            self._request_ids[job.custom_id] = request_ids
        return request_ids

    def _leave(self, pins: Iterable[Pin | None]) -> None:
        """Prompts have ended, or never began: the last one of a group gives its prefix up."""
        for pin in pins:
            if pin is not None:
                self._left[pin.name] -= 1
                if not self._left[pin.name]:
                    del self._left[pin.name]
                    self._engine.unpin(pin.name)

    def _abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._engine.abort(request_id)

    def _land(self, request_id: str, output: RequestOutput) -> Iterator[Answer]:
        """Note an answered prompt; the job is answered with its last one."""
        if output.error:
            raise DeviceError(output.error)
        started, place = self._running.pop(request_id)
        job = started.job
        started.outputs[place] = output
        self._leave(job.pins[place : place + 1])
        outputs = [each for each in started.outputs if each is not None]
        if len(outputs) == len(started.outputs):
            yield started.number, started.custom_id, job.work.answer(job.model, outputs)


def tokenizer_of(engine: Engine) -> Tokenizer | None:
    """None for a model that only knows token ids."""
    try:
        return engine.tokenizer
    except RequestError:
        return None
