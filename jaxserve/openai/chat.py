"""/v1/chat/completions: bodies -> turns; answers -> bodies, whole or in chunks."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from jaxserve.openai.constraint import GuidedFields, ResponseFormat, only_one
from jaxserve.openai.envelope import dumps, envelope, usage, usage_so_far
from jaxserve.openai.errors import ApiError
from jaxserve.openai.fields import NEUTRAL, JsonObject, MetaFields, SamplingFields, StreamFields
from jaxserve.openai.logprobs import Table, chat_logprobs, prompt_logprobs
from jaxserve.openai.messages import Message
from jaxserve.openai.reader import News, Reader, Thought
from jaxserve.openai.tools.choice import Tool, ToolChoice, tool_use
from jaxserve.openai.tools.parser import Arguments, CallStart, Text
from jaxserve.openai.turn import Dialect, Turn, turn_of
from jaxserve.output import CompletionOutput, Event, RequestOutput
from jaxserve.request import SamplingParams

PREFIX = "chatcmpl-"


class ChatBody(SamplingFields, StreamFields, MetaFields, GuidedFields):
    """The body of a request."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **NEUTRAL,
        "echo": (False,),
        "add_special_tokens": (False,),
        "return_tokens_as_token_ids": (False,),
    }

    model: str | None = None
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: JsonObject | None = None
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = None
    include_reasoning: bool = True
    return_token_ids: bool = False

    def turn(self, dialect: Dialect) -> Turn:
        """What is asked of a model that writes like this.

        Raises:
          ApiError: a field is out of range, cannot be obeyed, or contradicts another.
        """
        asks_for_both = self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set
        if self.continue_final_message and asks_for_both:
            raise ApiError(
                "continue_final_message and add_generation_prompt contradict each other",
                param="continue_final_message",
            )
        form = None if self.response_format is None else self.response_format.constraint()
        return turn_of(
            dialect,
            self.messages,
            tool_use(self.tools or (), self.tool_choice, dialect.tool_parser, parallel=self.parallel_tool_calls),
            only_one(response_format=form, structured_outputs=self.structured_outputs, **self.guided()),
            sampling=self._sampling,
            variables=self.chat_template_kwargs,
            effort=self.reasoning_effort,
            generate=self.add_generation_prompt,
            continues=self.continue_final_message,
        )

    def _sampling(self, **more: Any) -> SamplingParams:
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise ApiError("max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.logprobs:
            more["logprobs"] = self.top_logprobs or 0
        called = {"logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            called["max_tokens"] = "max_completion_tokens"
        return self.sampling_params(called=called, max_tokens=next(iter(limits), None), **more)


def answer(body: ChatBody, turn: Turn, response_id: str, model: str, output: RequestOutput) -> dict[str, Any]:
    """`chat.completion`."""
    made = envelope(response_id, "chat.completion", model)
    made["choices"] = [_choice(body, turn, output, each) for each in output.outputs]
    made["usage"] = usage([output])
    if body.prompt_logprobs is not None:
        made["prompt_logprobs"] = prompt_logprobs(output)
    if body.return_token_ids:
        made["prompt_token_ids"] = output.prompt_token_ids
    return made


def _choice(body: ChatBody, turn: Turn, output: RequestOutput, each: CompletionOutput) -> dict[str, Any]:
    reader = turn.reader(output.prompt)
    delta = _delta([*reader.push(each.text), *reader.finish()], body.include_reasoning)
    calls = delta.get("tool_calls", [])
    message: dict[str, Any] = {
        "role": "assistant",
        "content": delta.get("content", None if calls else ""),
        "refusal": None,
    }
    if calls:
        message["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in calls]
    if turn.reasoning is not None and body.include_reasoning:
        thought = delta.get("reasoning")
        message |= {"reasoning": thought, "reasoning_content": thought}
    choice = {
        "index": each.index,
        "message": message,
        "logprobs": _logprobs(body, each.token_ids, each.logprobs),
        "finish_reason": _finish_reason(turn, each.finish_reason, has_called=bool(calls)),
        "stop_reason": each.stop_reason,
    }
    return choice | ({"token_ids": each.token_ids} if body.return_token_ids else {})


def _logprobs(body: ChatBody, ids: Sequence[int], tables: Sequence[Table] | None) -> dict[str, Any] | None:
    return None if tables is None else chat_logprobs(ids, tables, body.top_logprobs or 0)


def _finish_reason(turn: Turn, reason: str | None, *, has_called: bool) -> str | None:
    """As OpenAI has it: "tool_calls" where the model could have done something else."""
    return "tool_calls" if reason == "stop" and has_called and not turn.tools.name else reason


def _delta(news: Sequence[News], include_reasoning: bool) -> dict[str, Any]:
    """What is new, each kind put together; nothing for what is not there."""
    thoughts, texts, calls = list[str](), list[str](), dict[int, dict[str, Any]]()
    for each in news:
        match each:
            case Text(text):
                texts.append(text)
            case Thought(text):
                thoughts.append(text)
            case CallStart(index, call_id, name):
                function = {"name": name, "arguments": ""}
                calls[index] = {"index": index, "id": call_id, "type": "function", "function": function}
            case Arguments(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    delta: dict[str, Any] = {}
    if thoughts and include_reasoning:
        delta["reasoning"] = delta["reasoning_content"] = "".join(thoughts)
    if texts:
        delta["content"] = "".join(texts)
    if calls:
        delta["tool_calls"] = list(calls.values())
    return delta


class Chunks:
    """The frames of a streamed answer."""

    def __init__(self, body: ChatBody, turn: Turn, response_id: str, model: str):
        self._body = body
        self._turn = turn
        # The beginning of all frames is the same, and made once.
        self._head = b"data: " + dumps(envelope(response_id, "chat.completion.chunk", model))[:-1] + b',"choices":['
        self._with_usage, self._with_counts = body.with_usage, body.with_counts
        self._places: dict[int, _Place] = {}

    def of(self, event: Event) -> bytes:
        """The frames of an event; empty, if it says nothing yet."""
        place = self._places.get(event.index)
        begin = b""
        if place is None:
            place = self._places[event.index] = _Place(self._turn.reader(event.output.prompt))
            begin = self._frame(self._first(event), event.output)
        place.num_tokens += len(event.token_ids)
        news = place.reader.push(event.text) if event.text else []
        if event.finish_reason:
            news = [*news, *place.reader.finish()]
        delta = _delta(news, self._body.include_reasoning)
        place.has_called = place.has_called or "tool_calls" in delta
        if not delta and not event.finish_reason and not self._body.return_token_ids:
            return begin  # inside of a character, of what may be a tag or a stop string, or of a thought nobody wants
        reason = _finish_reason(self._turn, event.finish_reason, has_called=place.has_called)
        choice: dict[str, Any] = {"index": event.index, "delta": delta, "logprobs": None, "finish_reason": reason}
        if self._body.logprobs:
            choice["logprobs"] = place.logprobs(self._body, event)
        if event.finish_reason:
            choice["stop_reason"] = event.output.outputs[event.index].stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = list(event.token_ids)
        return begin + self._frame(choice, event.output)

    def end(self, output: RequestOutput) -> bytes:
        """The last frame, if it is wanted: no choice, but the usage of all."""
        return self._head + b'],"usage":' + dumps(usage([output])) + b"}\n\n" if self._with_usage else b""

    def _first(self, event: Event) -> dict[str, Any]:
        first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return {"index": event.index} | first

    def _frame(self, choice: dict[str, Any], output: RequestOutput) -> bytes:
        told = b"]}\n\n"
        if self._with_counts:
            num_answer = sum(place.num_tokens for place in self._places.values())
            told = b'],"usage":' + dumps(usage_so_far(output, num_answer)) + b"}\n\n"
        elif self._with_usage:
            told = b'],"usage":null}\n\n'
        return self._head + dumps(choice) + told


class _Place:
    """How far the stream of one answer is."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.has_called = False
        self.num_tokens = 0
        self._num_told = 0  # those whose log-probabilities have been told

    def logprobs(self, body: ChatBody, event: Event) -> dict[str, Any] | None:
        """Of the tokens since they were told last: not every event makes a chunk."""
        known = event.output.outputs[event.index]
        begin, self._num_told = self._num_told, self.num_tokens
        tables = (known.logprobs or [])[begin : self.num_tokens]
        return chat_logprobs(known.token_ids[begin : self.num_tokens], tables, body.top_logprobs or 0)
