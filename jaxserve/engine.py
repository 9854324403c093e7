"""Requests in, events out: what becomes of the tokens that steps bring: text, stop strings, events, answers."""

import dataclasses
from collections.abc import Iterable

from jaxserve.clock import Clock
from jaxserve.errors import DeviceError
from jaxserve.executor.base import Executor
from jaxserve.output import CompletionOutput, Event, Logprob, RequestMetrics, RequestOutput
from jaxserve.pipeline import Pipeline
from jaxserve.request import Finish, Request, Task, check_priority, check_tokens
from jaxserve.scheduler.core import Scheduler
from jaxserve.scheduler.progress import Progress, is_end
from jaxserve.scheduler.sequence import Sequence
from jaxserve.step import TokenLogprob
from jaxserve.tally import Tally
from jaxserve.tokenizer import Detokenizer, Tokenizer


@dataclasses.dataclass(slots=True)
class _Answer:
    """One sequence on its way to a CompletionOutput."""

    sequence: Sequence
    output: CompletionOutput
    detokenizer: Detokenizer | None
    num_sent: int = 0  # characters already in events
    num_sent_tokens: int = 0
    token_s: float | None = None  # when the last token came


@dataclasses.dataclass(slots=True)
class _Job:
    """A request with its answers."""

    request: Request
    output: RequestOutput
    answers: list[_Answer]

    @property
    def is_done(self) -> bool:
        """Whether every answer has ended."""
        return all(a.output.finish_reason for a in self.answers)


class Engine:
    """Continuous batching over an executor. Not thread-safe: one thread calls `step`."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        tokenizer: Tokenizer | None,
        *,
        clock: Clock,
        vocab_size: int,
        max_model_len: int,
        seed: int = 0,
        overlap: bool = True,
    ):
        self.scheduler = scheduler
        self.pipeline = Pipeline(scheduler, executor, clock, overlap=overlap)
        self.failed_steps = 0
        self.tally = Tally(max_model_len)
        self._tokenizer = tokenizer
        self._clock = clock
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._seed = seed
        self._num_requests = 0
        self._jobs: dict[str, _Job] = {}
        self._by_sequence: dict[str, tuple[_Job, _Answer]] = {}

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished, or a step is under way."""
        return bool(self._jobs) or self.pipeline.is_busy

    def check(self, request: Request) -> None:
        """Raise RequestError if a request can never be served."""
        check_tokens(request, self._vocab_size, self._max_model_len)

    def add(self, request: Request, prompt: str | None = None) -> None:
        """Queue a request. `prompt` is its text, only to be handed back with the answer.

        Raises:
          RequestError: it can never be served; nothing has changed.
        """
        self.check(request)
        if request.request_id in self._jobs:
            raise ValueError(f"request id {request.request_id!r} is in use")
        now_s, params = self._clock.now_s(), request.params
        self._num_requests += 1
        unknown: list[dict[int, Logprob] | None] = [None] * len(request.prompt_token_ids)
        output = RequestOutput(
            request_id=request.request_id,
            prompt=prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[],
            metrics=RequestMetrics(arrival_s=request.arrival_s or now_s),
            prompt_logprobs=None if request.logprobs_from is None else unknown,
        )
        job = self._jobs[request.request_id] = _Job(request, output, [])
        for index in range(params.n):
            sequence = self._sequence(request, index, job.answers[0].sequence if index else None, now_s)
            answer = _Answer(sequence, CompletionOutput(index=index), self._detokenizer(request))
            if params.logprobs is not None:
                answer.output.logprobs, answer.output.cumulative_logprob = [], 0.0
            job.answers.append(answer)
            output.outputs.append(answer.output)
            self._by_sequence[sequence.seq_id] = job, answer
            self.scheduler.add(sequence, now_s)

    def abort(self, request_id: str, index: int | None = None) -> list[Event]:
        """End a request now, or only its answer `index`. What is unknown or has ended is ignored."""
        job = self._jobs.get(request_id)
        return [] if job is None else self._end(job, Finish.ABORT, index)

    def set_priority(self, request_id: str, priority: float) -> None:
        """Change a request's priority, for policies that go by it (smaller goes first). What is unknown or has ended is
        ignored.

        Raises:
          RequestError: it is no number.
        """
        check_priority(priority)
        job = self._jobs.get(request_id)
        for answer in job.answers if job is not None else ():
            self.scheduler.set_priority(answer.sequence, priority)

    def end_program(self, program: str) -> None:
        """Say that no more requests of a program will come, so that policies may forget what they know of it."""
        self.scheduler.end_program(program, self._clock.now_s())

    def step(self) -> list[Event]:
        """Plan and dispatch one step, and collect the one before it (or this one, when nothing can overlap).

        When a step fails on the device, all requests that have begun end with finish_reason "error"; the others go on.
        """
        try:
            progress = self.pipeline.advance()
        except DeviceError as error:
            return self._lose_pool(error)
        came_s = self._clock.now_s()
        events = list(self._events(progress, came_s))
        self.tally.stepped(self.pipeline.num_tokens, came_s)
        self.tally.took(self.pipeline.took | {"events": self._clock.now_s() - came_s})
        return events

    def _lose_pool(self, error: DeviceError) -> list[Event]:
        """End whom a failed step has cost something: blocks, or (if preempted since) what steps under way computed."""
        under_way = self.pipeline.drop()
        self.failed_steps += 1
        events = []
        for seq_id in [*under_way, *self.scheduler.running_ids]:
            if seq_id in self._by_sequence:  # else it has ended, alone or with its request
                job, _ = self._by_sequence[seq_id]
                job.output.error = str(error)
                events += self._end(job, Finish.ERROR)
        self.scheduler.clear_cache()
        return events

    def _end(self, job: _Job, finish: Finish, index: int | None = None) -> list[Event]:
        """End the answers of a request (or one of them) that have not ended yet."""
        events = []
        for answer in job.answers:
            if not answer.output.finish_reason and index in (None, answer.output.index):
                self.scheduler.abort(answer.sequence, self._clock.now_s())
                events.append(self._event(job, answer, finish))
        return events

    def _events(self, progress: Iterable[Progress], came_s: float) -> Iterable[Event]:
        for item in progress:
            job, answer = self._by_sequence[item.sequence.seq_id]
            if item.result.prompt_logprobs is not None:
                self._note_prompt(job, item.row.start, item.result.prompt_logprobs)
            if item.result.hidden is not None:
                job.output.hidden = item.result.hidden
            finish = item.finish
            if item.result.token_id is not None and job.request.task is Task.GENERATE:
                self._note_time(job, answer, came_s)
                finish = self._note_token(job, answer, item.result.token_id, item.result.logprob, finish)
            elif finish is None:
                continue
            if finish is Finish.ERROR and item.sequence.guide is not None:
                answer.output.error = item.sequence.guide.error
            yield self._event(job, answer, finish)

    def _note_time(self, job: _Job, answer: _Answer, came_s: float) -> None:
        """A token has come."""
        metrics = job.output.metrics
        if metrics.first_token_s is None:
            metrics.first_token_s = came_s
            self.tally.began(job.request, metrics.arrival_s, came_s)
        self.tally.token(answer.token_s)
        answer.token_s = came_s

    def _note_token(
        self, job: _Job, answer: _Answer, token_id: int, logprob: TokenLogprob | None, finish: Finish | None
    ) -> Finish | None:
        """Append a token; returns why the answer ends here, if it does (a stop string may end it)."""
        output, params = answer.output, job.request.params
        output.token_ids.append(token_id)
        if logprob is not None and output.logprobs is not None:
            output.logprobs.append(self._logprobs(logprob))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + logprob.logprob
        is_stop_token = finish is Finish.STOP and is_end(job.request, token_id)  # else its grammar has come to an end
        if is_stop_token:
            output.stop_reason = token_id if token_id in params.stop_token_ids else None
        if answer.detokenizer is None:
            return finish
        if not is_stop_token or params.include_stop_str_in_output:
            num_searched = len(output.text)
            output.text += answer.detokenizer.push(token_id)
            if finish:
                output.text += answer.detokenizer.flush()
            may_stop = len(output.token_ids) >= params.min_tokens
            stop = _find_stop(output.text, params.stop, num_searched) if may_stop else None
            if stop:
                begin, output.stop_reason = stop
                kept = begin + (len(output.stop_reason) if params.include_stop_str_in_output else 0)
                output.text = output.text[:kept]
                self.scheduler.finish(answer.sequence, self._clock.now_s())
                return Finish.STOP
        else:
            output.text += answer.detokenizer.flush()
        return finish

    def _event(self, job: _Job, answer: _Answer, finish: Finish | None) -> Event:
        output, metrics = answer.output, job.output.metrics
        if metrics.started_s is None:
            metrics.started_s = answer.sequence.view.admitted_s
            metrics.num_cached_tokens = answer.sequence.num_cached
        if finish:
            output.finish_reason = str(finish)
            del self._by_sequence[answer.sequence.seq_id]
            metrics.num_cached_tokens = max(metrics.num_cached_tokens, answer.sequence.num_cached)
            metrics.num_preemptions += answer.sequence.view.num_preemptions
            if job.is_done:
                job.output.finished = True
                metrics.finished_s = self._clock.now_s()
                del self._jobs[job.request.request_id]
                self.tally.ended(job.request, job.output)
        # A stop string may be on its way: hold back what could be its beginning.
        held = 0 if finish else _held_back(output.text, job.request.params.stop)
        text = output.text[answer.num_sent : len(output.text) - held]
        tokens = tuple(output.token_ids[answer.num_sent_tokens :])
        answer.num_sent, answer.num_sent_tokens = answer.num_sent + len(text), len(output.token_ids)
        return Event(job.request.request_id, output.index, text, tokens, output.finish_reason, job.output)

    def _note_prompt(self, job: _Job, start: int, scores: tuple[TokenLogprob | None, ...]) -> None:
        assert job.output.prompt_logprobs is not None
        for offset, score in enumerate(scores):
            if score is not None:
                job.output.prompt_logprobs[start + offset + 1] = self._logprobs(score)

    def _logprobs(self, score: TokenLogprob) -> dict[int, Logprob]:
        """The chosen token first, then the likeliest ones."""
        table = {score.token_id: Logprob(score.logprob, score.rank, self._token_text(score.token_id))}
        for rank, (token, value) in enumerate(zip(score.top_ids, score.top_logprobs, strict=True), start=1):
            table.setdefault(token, Logprob(value, rank, self._token_text(token)))
        return table

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _detokenizer(self, request: Request) -> Detokenizer | None:
        if self._tokenizer is None or request.task is not Task.GENERATE:
            return None
        skip = request.params.skip_special_tokens
        return self._tokenizer.detokenizer(request.prompt_token_ids, skip_special_tokens=skip)

    def _sequence(self, request: Request, index: int, parent: Sequence | None, now_s: float) -> Sequence:
        params, num_prompt = request.params, len(request.prompt_token_ids)
        limit = self._max_model_len if params.max_tokens is None else num_prompt + params.max_tokens
        # A request id may be used again while a wasted row of its last use is still under way; a sequence id may not.
        seq_id = f"{request.request_id}/{index}#{self._num_requests}"
        # Without a seed of its own, a request gets one from the engine's seed and its place in the engine's history.
        seed = params.seed if params.seed is not None else hash((self._seed, self._num_requests))
        return Sequence(
            seq_id=seq_id,
            request=request,
            seed=(seed + index) % (1 << 32),
            max_len=min(limit, self._max_model_len),
            arrival_s=request.arrival_s or now_s,
            parent=parent,
        )


def _find_stop(text: str, stops: Iterable[str], num_searched: int) -> tuple[int, str] | None:
    """The earliest stop string that ends beyond the characters searched before: where it begins, and which."""
    found = [(text.find(stop, max(num_searched - len(stop) + 1, 0)), stop) for stop in stops]
    return min(((begin, stop) for begin, stop in found if begin >= 0), default=None)


def _held_back(text: str, stops: Iterable[str]) -> int:
    """Characters at the end of `text` that may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
