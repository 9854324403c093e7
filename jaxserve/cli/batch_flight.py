"""Many jobs in the engine at once: whenever one is done, the next is started."""

import dataclasses
import itertools
import traceback
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from jaxserve.cli.batch_answer import body_of
from jaxserve.cli.batch_body import Item, Job, Pin
from jaxserve.cli.batch_schema import LineError
from jaxserve.errors import DeviceError, JaxserveError, RequestError
from jaxserve.request import SamplingParams, Task

if TYPE_CHECKING:
    from jaxserve.llm import LLM
    from jaxserve.output import RequestOutput
    from jaxserve.tokenizer import Tokenizer

Answer = tuple[int, str | None, dict[str, Any] | LineError]  # line number, custom_id, body or what is wrong


@dataclasses.dataclass(slots=True)
class Started:
    """A job in the engine. `outputs` by the place of the prompt in the job, None until it is answered."""

    number: int
    custom_id: str | None
    job: Job
    outputs: list["RequestOutput | None"]


class Flight:
    """Keeps about twice as many prompts in the engine as it can run at once, so that it never waits for us."""

    def __init__(self, llm: "LLM", jobs: Iterator[Item]):
        self._llm = llm
        self._jobs = jobs
        self._max_prompts = 2 * llm.config.max_running
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
            while self._running:
                for event in self._llm.step():
                    if event.output.finished and event.request_id in self._running:
                        yield from self._land(event.request_id, event.output)
                yield from self._refill()
        finally:
            self._abort(self._running)
            for name in self._left:
                self._llm.unpin(name)

    def _refill(self) -> Iterator[Answer]:
        """Start jobs while there is room; jobs that cannot start are answered at once."""
        while len(self._running) < self._max_prompts:
            number, custom_id, job = next(self._jobs, (0, None, None))
            if job is None:
                return
            if isinstance(job, Job):
                job = self._start(number, custom_id, job) or job
            if isinstance(job, LineError):
                yield number, custom_id, job

    def _start(self, number: int, custom_id: str | None, job: Job) -> LineError | None:
        self._left = {pin.name: pin.num_members for pin in job.pins if pin is not None} | self._left
        try:
            request_ids = self._submit(job)
        except JaxserveError as error:
            self._leave(job.pins)
            return LineError(str(error))
        except Exception as error:  # noqa: BLE001  one line must not stop the others; the trace is for us
            self._leave(job.pins)
            traceback.print_exc()
            return LineError(f"{type(error).__name__}: {error}", code="internal_error", status=500)
        started = Started(number, custom_id, job, [None] * len(request_ids))
        self._running |= {request_id: (started, place) for place, request_id in enumerate(request_ids)}
        return None

    def _submit(self, job: Job) -> list[str]:
        """Hand all prompts of a job to the engine, or none of them."""
        prompts = job.prompts or [self._llm.chat_prompt(job.messages, **job.template)]
        is_embedding = job.url == "/v1/embeddings"
        params = SamplingParams(temperature=0.0) if is_embedding else job.params
        task = Task.EMBED if is_embedding else Task.GENERATE
        meta = dict(job.meta)
        if "parents" in meta:
            meta["parents"] = tuple(id_ for parent in meta["parents"] for id_ in self._request_ids.get(parent, ()))
        request_ids = list[str]()
        try:
            for prompt, pin in itertools.zip_longest(prompts, job.pins):
                pinned = meta if pin is None else meta | {"pin": pin.name, "pin_tokens": pin.num_tokens}
                request_ids.append(self._llm.submit(prompt, params, task=task, meta=pinned))
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
                    self._llm.unpin(pin.name)

    def _abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._llm.abort(request_id)

    def _land(self, request_id: str, output: "RequestOutput") -> Iterator[Answer]:
        """Note an answered prompt; the job is answered with its last one."""
        if output.error:
            raise DeviceError(output.error)
        started, place = self._running.pop(request_id)
        started.outputs[place] = output
        self._leave(started.job.pins[place : place + 1])
        outputs = [each for each in started.outputs if each is not None]
        if len(outputs) == len(started.outputs):
            yield started.number, started.custom_id, body_of(started.job, outputs, tokenizer_of(self._llm))


def tokenizer_of(llm: "LLM") -> "Tokenizer | None":
    """None for a model that only knows token ids."""
    try:
        return llm.tokenizer
    except RequestError:
        return None
