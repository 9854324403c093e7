"""/v1/completions: bodies -> prompts and sampling options; answers -> bodies, whole or in chunks."""

from collections.abc import Sequence
from typing import Any

from pydantic import field_validator

from jaxserve.openai.constraint import Asked, GuidedFields, ResponseFormat, only_one, told_with
from jaxserve.openai.envelope import dumps, envelope, frame, usage, usage_so_far
from jaxserve.openai.errors import ApiError
from jaxserve.openai.fields import NEUTRAL, MetaFields, SamplingFields, StreamFields
from jaxserve.openai.logprobs import Table, completion_logprobs, prompt_logprobs
from jaxserve.openai.prompts import PromptFields, Prompts, check_count, listed
from jaxserve.output import CompletionOutput, Event, RequestOutput
from jaxserve.request import SamplingParams
from jaxserve.tokenizer import Tokenizer

PREFIX = "cmpl-"
MAX_PROMPTS = 1024  # of one body


class CompletionBody(SamplingFields, PromptFields, StreamFields, MetaFields, GuidedFields):
    """The body of a request."""

    neutral = NEUTRAL

    model: str | None = None
    prompt: Prompts
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None
    response_format: ResponseFormat | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False

    @field_validator("prompt")
    @classmethod
    def _count(cls, prompt: Any) -> Any:
        return check_count(prompt, MAX_PROMPTS)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One by one."""
        return listed(self.prompt)

    @property
    def prompt_only(self) -> bool:
        """Whether the prompt is only scored. A token is computed all the same, and left out."""
        return self.echo and self.max_tokens == 0

    def params(self) -> SamplingParams:
        """How to answer.

        Raises:
          ApiError: an option is out of range, or cannot be obeyed.
        """
        if self.best_of not in (None, self.n or 1):
            raise ApiError("best_of other than n is not supported", param="best_of", code="unsupported_field")
        asked = self.asked()
        more: dict[str, Any] = {"logprobs": self.logprobs}
        if asked is not None:
            more["structured_outputs"] = asked.constraint
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            more["prompt_logprobs"] = self.logprobs
        if self.max_tokens is None or self.prompt_only:
            more["max_tokens"] = 1 if self.prompt_only else 16
        try:
            return self.sampling_params(**more)
        except ApiError as error:
            if asked is not None and error.param == "structured_outputs":
                raise told_with(error.message, asked.field) from None
            raise

    def asked(self) -> Asked | None:
        """The form that answers must have.

        Raises:
          ApiError: there are several, or its schema is missing.
        """
        form = None if self.response_format is None else self.response_format.constraint()
        return only_one(response_format=form, structured_outputs=self.structured_outputs, **self.guided())


def answer(
    body: CompletionBody, response_id: str, model: str, outputs: Sequence[RequestOutput], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """`text_completion`; with several prompts the choices of each follow one another."""
    choices = []
    for output in outputs:
        for each in output.outputs:
            choices.append({"index": len(choices)} | _choice(body, output, each, tokenizer))
    totals = usage(outputs, prompt_only=body.prompt_only)
    return envelope(response_id, "text_completion", model) | {"choices": choices, "usage": totals}


def _choice(
    body: CompletionBody, output: RequestOutput, each: CompletionOutput, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    text = "" if body.prompt_only else each.text
    if body.echo:
        text = _prompt_text(output, tokenizer) + text
    logprobs = None
    if each.logprobs is not None:
        tables: list[Table | None] = [] if body.prompt_only else list(each.logprobs)
        ids = [] if body.prompt_only else each.token_ids
        if body.echo:
            tables, ids = [*(output.prompt_logprobs or ()), *tables], [*output.prompt_token_ids, *ids]
        as_ids = body.return_tokens_as_token_ids
        logprobs, _ = completion_logprobs(ids, tables, body.logprobs or 0, tokenizer, as_ids=as_ids)
    choice: dict[str, Any] = {"text": text, "logprobs": logprobs, "finish_reason": each.finish_reason}
    choice["stop_reason"] = each.stop_reason
    if tokenizer is None or body.return_token_ids:
        choice["token_ids"] = [] if body.prompt_only else each.token_ids
    if body.return_token_ids:
        choice["prompt_token_ids"] = output.prompt_token_ids
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs(output)
    return choice


class Chunks:
    """The frames of a streamed answer. Events of a request come in order; the requests of several prompts in any."""

    def __init__(self, body: CompletionBody, response_id: str, model: str, tokenizer: Tokenizer | None):
        self._body = body
        self._tokenizer = tokenizer
        self._head = envelope(response_id, "text_completion", model)
        self._num_answers = body.n or 1
        self._with_usage, self._with_counts = body.with_usage, body.with_counts
        self._places: dict[tuple[int, int], _Place] = {}
        told = (body.logprobs, body.prompt_logprobs)
        self._is_plain = told == (None, None) and not (self._with_ids or self._with_counts or body.echo)
        self._plain: dict[tuple[int, int], tuple[bytes, bytes]] = {}  # what stands before and after the text

    def of(self, prompt: int, event: Event) -> bytes:
        """The frame of an event of the prompt with this number; empty, if it says nothing."""
        if self._is_plain and not event.finish_reason:  # nearly always
            return self._plain_frame(prompt, event) if event.text else b""
        place = self._places.setdefault((prompt, event.index), _Place())
        text, logprobs = event.text, None
        first = place.num_events == 0
        place.num_events += 1
        place.num_tokens += len(event.token_ids)
        if self._body.prompt_only:
            if not event.finish_reason:
                return b""
            text = ""
        if first and self._body.echo:
            text = _prompt_text(event.output, self._tokenizer) + text
        elif not text and not event.finish_reason and not self._tells_tokens:
            return b""  # inside of a character, or what may be a stop string
        if self._body.logprobs is not None:
            logprobs = self._logprobs(place, event, first)
        choice: dict[str, Any] = {
            "index": prompt * self._num_answers + event.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": event.finish_reason,
        }
        if event.finish_reason:
            choice["stop_reason"] = event.output.outputs[event.index].stop_reason
        if self._with_ids:
            choice["token_ids"] = [] if self._body.prompt_only else list(event.token_ids)
        if first and self._body.return_token_ids:
            choice["prompt_token_ids"] = event.output.prompt_token_ids
        if first and self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(event.output)
        return self._frame(choice, self._usage_so_far(prompt, event) if self._with_counts else None)

    def _plain_frame(self, prompt: int, event: Event) -> bytes:
        """Of text and nothing else: only the text is turned into JSON."""
        around = self._plain.get((prompt, event.index))
        if around is None:
            index = prompt * self._num_answers + event.index
            empty = self._frame({"index": index, "text": "", "logprobs": None, "finish_reason": None}, None)
            before, mark, after = empty.partition(b'"text":""')  # inside of a JSON string quotes have a backslash
            around = self._plain[prompt, event.index] = before + mark[:-2], after
        return around[0] + dumps(event.text) + around[1]

    def _frame(self, choice: dict[str, Any], so_far: dict[str, Any] | None) -> bytes:
        chunk = self._head | {"choices": [choice]}
        if self._with_usage or self._with_counts:
            chunk["usage"] = so_far
        return frame(chunk)

    def end(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The last frame, if it is wanted: no choice, but the usage of all."""
        if not self._with_usage:
            return b""
        return frame(self._head | {"choices": [], "usage": usage(outputs, prompt_only=self._body.prompt_only)})

    @property
    def _with_ids(self) -> bool:
        return self._tokenizer is None or self._body.return_token_ids

    @property
    def _tells_tokens(self) -> bool:
        """Whether events without text say something."""
        return self._with_ids or self._body.logprobs is not None or self._body.prompt_logprobs is not None

    def _usage_so_far(self, prompt: int, event: Event) -> dict[str, Any]:
        counts = (place.num_tokens for (number, _), place in self._places.items() if number == prompt)
        return usage_so_far(event.output, 0 if self._body.prompt_only else sum(counts))

    def _logprobs(self, place: "_Place", event: Event, first: bool) -> dict[str, Any]:
        known = event.output.outputs[event.index].logprobs or []
        count = 0 if self._body.prompt_only else len(event.token_ids)
        ids, tables = list(event.token_ids[:count]), list[Table | None](known[place.num_tokens - count :][:count])
        if first and self._body.echo:
            ids = [*event.output.prompt_token_ids, *ids]
            tables = [*(event.output.prompt_logprobs or ()), *tables]
        as_ids, num_top = self._body.return_tokens_as_token_ids, self._body.logprobs or 0
        made, place.offset = completion_logprobs(ids, tables, num_top, self._tokenizer, place.offset, as_ids=as_ids)
        return made


class _Place:
    """How far the stream of one answer is."""

    def __init__(self) -> None:
        self.num_events = 0
        self.num_tokens = 0
        self.offset = 0  # characters of those whose log-probabilities have been told


def _prompt_text(output: RequestOutput, tokenizer: Tokenizer | None) -> str:
    if output.prompt is not None:
        return output.prompt
    return "" if tokenizer is None else tokenizer.decode(output.prompt_token_ids)
