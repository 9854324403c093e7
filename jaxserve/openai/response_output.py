"""/v1/responses: what a model says -> items, the events of a stream, and the response itself."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from jaxserve.openai.envelope import dumps
from jaxserve.openai.ids import new_id
from jaxserve.openai.logprobs import chat_logprobs
from jaxserve.openai.messages import FunctionCall, Message, ToolCall
from jaxserve.openai.reader import News, Reader, Thought
from jaxserve.openai.responses import ResponseBody
from jaxserve.openai.tools.parser import Arguments, CallStart, Text
from jaxserve.openai.turn import Turn
from jaxserve.output import Event, RequestOutput

Fields = dict[str, Any]


class Items:
    """Items of one answer, made as it comes. Each call returns the events that tell of it, without their numbers."""

    def __init__(self) -> None:
        self.done: list[Fields] = []
        self._open: Fields | None = None
        self._text: list[str] = []  # of the open item
        self._logprobs: list[Fields] = []
        self._waiting: list[Fields] = []  # log-probabilities of tokens that became no text yet

    def add(self, news: Iterable[News], logprobs: Sequence[Fields] = ()) -> list[Fields]:
        """More has been said; `logprobs` belong to its text."""
        self._waiting += logprobs
        events = list[Fields]()
        for each in news:
            match each:
                case CallStart(_, call_id, name):
                    call = {"call_id": call_id, "name": name, "arguments": ""}
                    events += self._begin({"id": new_id("fc_"), "type": "function_call"} | call)
                case Arguments(_, text):
                    events.append(self._delta("response.function_call_arguments.delta", text))
                case Thought(text):
                    if self._kind != "reasoning":
                        events += self._begin({"id": new_id("rs_"), "type": "reasoning", "summary": [], "content": []})
                    events.append(self._delta("response.reasoning_text.delta", text, content_index=0))
                case Text(text):
                    if self._kind != "message":
                        said = {"type": "message", "role": "assistant", "content": []}
                        events += self._begin({"id": new_id("msg_")} | said)
                    delta = self._delta("response.output_text.delta", text, content_index=0)
                    events.append(delta | {"logprobs": self._waiting})
                    self._logprobs, self._waiting = self._logprobs + self._waiting, []
        return events

    def end(self, status: str = "completed") -> list[Fields]:
        """Nothing more of the open item will come."""
        if self._open is None:
            return []
        item, text = self._open | {"status": status}, "".join(self._text)
        place = {"item_id": item["id"], "output_index": len(self.done)}
        events = list[Fields]()
        match item["type"]:
            case "function_call":
                item["arguments"] = text
                told = {"type": "response.function_call_arguments.done", "name": item["name"], "arguments": text}
                events.append(told | place)
            case "reasoning":
                part = {"type": "reasoning_text", "text": text}
                item["content"] = [part]
                place["content_index"] = 0
                events.append({"type": "response.reasoning_text.done", "text": text} | place)
                events.append({"type": "response.content_part.done", "part": part} | place)
            case _:
                logprobs = self._logprobs + self._waiting
                part = _text_part(text, logprobs)
                item["content"] = [part]
                place["content_index"] = 0
                told = {"type": "response.output_text.done", "text": text, "logprobs": logprobs}
                events.append(told | place)
                events.append({"type": "response.content_part.done", "part": part} | place)
        events.append({"type": "response.output_item.done", "output_index": len(self.done), "item": item})
        self.done.append(item)
        self._open, self._text, self._logprobs, self._waiting = None, [], [], []
        return events

    @property
    def _kind(self) -> str:
        return "" if self._open is None else self._open["type"]

    def _begin(self, item: Fields) -> list[Fields]:
        events = self.end()
        self._open = item | {"status": "in_progress"}
        index = len(self.done)
        events.append({"type": "response.output_item.added", "output_index": index, "item": self._open})
        if item["type"] != "function_call":
            is_text = item["type"] == "message"
            part = _text_part("", []) if is_text else {"type": "reasoning_text", "text": ""}
            place = {"item_id": item["id"], "output_index": index, "content_index": 0}
            events.append({"type": "response.content_part.added", "part": part} | place)
        return events

    def _delta(self, kind: str, text: str, **more: Any) -> Fields:
        assert self._open is not None
        self._text.append(text)
        place = {"item_id": self._open["id"], "output_index": len(self.done)}
        return {"type": kind, "delta": text} | place | more


def _text_part(text: str, logprobs: list[Fields]) -> Fields:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


class Response:
    """One response as it comes to be: `created`, `of` each event (or `whole`), then `end`; `body` is what it is so far."""

    def __init__(self, body: ResponseBody, turn: Turn, response_id: str, model: str, *, stored: bool):
        self._body = body
        self._turn = turn
        self._items = Items()
        self._reader: Reader | None = None
        self._thoughts = list[str]()
        self._num_events = 0
        self._num_tokens = 0  # whose log-probabilities have been told
        self._asked = _asked(body, turn, response_id, model, stored)
        self.body: Fields = self._asked | {"status": "in_progress", "output": [], "usage": None}

    @property
    def thoughts(self) -> str:
        """All of them so far."""
        return "".join(self._thoughts)

    def created(self) -> bytes:
        """The first frames."""
        return self._frames(
            [{"type": f"response.{what}", "response": self.body} for what in ("created", "in_progress")]
        )

    def of(self, event: Event) -> bytes:
        """The frames of an event of the engine; empty, if it says nothing yet."""
        return self._frames(self._read(event))

    def whole(self, output: RequestOutput) -> None:
        """Read an answer that came at once."""
        answer = output.outputs[0]
        self._read(Event(output.request_id, 0, answer.text, tuple(answer.token_ids), answer.finish_reason, output))

    def end(self, output: RequestOutput, num_thought: int) -> bytes:
        """The last frame. `num_thought`: tokens of the thoughts."""
        reason = output.outputs[0].finish_reason
        status = "completed" if reason == "stop" else "incomplete"
        more: Fields = {"status": status, "output": self._items.done, "usage": _usage(output, num_thought)}
        if status == "completed":
            more["completed_at"] = int(time.time())
        else:
            more["incomplete_details"] = {"reason": "max_output_tokens" if reason == "length" else None}
        self.body = self._asked | more
        return self._frames([{"type": f"response.{status}", "response": self.body}])

    def failed(self, message: str) -> bytes:
        """The last frame of a response that the server has lost."""
        told = self._items.end("incomplete")
        error = {"code": "server_error", "message": message}
        self.body = self._asked | {"status": "failed", "error": error, "output": self._items.done, "usage": None}
        return self._frames([*told, {"type": "response.failed", "response": self.body}])

    def messages(self) -> list[Message]:
        """What the model has said, for the turns after this one. Thoughts are over."""
        text, calls = "", list[ToolCall]()
        for item in self._items.done:
            if item["type"] == "message":
                text += item["content"][0]["text"]
            elif item["type"] == "function_call":
                function = FunctionCall(name=item["name"], arguments=item["arguments"])
                calls.append(ToolCall(id=item["call_id"], function=function))
        return [Message(role="assistant", content=text, tool_calls=calls or None)]

    def _read(self, event: Event) -> list[Fields]:
        if self._reader is None:
            self._reader = self._turn.reader(event.output.prompt)
        news = self._reader.push(event.text)
        if event.finish_reason:
            news = [*news, *self._reader.finish()]
        self._thoughts += [each.text for each in news if isinstance(each, Thought)]
        events = self._items.add(news, self._logprobs(event) if self._body.wants_logprobs else ())
        if event.finish_reason:
            events += self._items.end("completed" if event.finish_reason == "stop" else "incomplete")
        return events

    def _logprobs(self, event: Event) -> Sequence[Fields]:
        known = event.output.outputs[0]
        begin, self._num_tokens = self._num_tokens, self._num_tokens + len(event.token_ids)
        tables = (known.logprobs or [])[begin : self._num_tokens]
        told = chat_logprobs(known.token_ids[begin : self._num_tokens], tables, self._body.top_logprobs or 0)
        return told["content"]

    def _frames(self, events: Iterable[Fields]) -> bytes:
        frames = list[bytes]()
        for event in events:
            numbered = event | {"sequence_number": self._num_events}
            frames.append(b"event: " + event["type"].encode() + b"\ndata: " + dumps(numbered) + b"\n\n")
            self._num_events += 1
        return b"".join(frames)


def _asked(body: ResponseBody, turn: Turn, response_id: str, model: str, stored: bool) -> Fields:
    """What was asked, as the response repeats it."""
    form = None if body.text is None else body.text.format
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "service_tier": "default",
        "store": stored,
        "temperature": turn.params.temperature,
        "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
        "tool_choice": _told(body.tool_choice) or "auto",
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": turn.params.top_p,
        "truncation": "disabled",
        "background": False,
    }


def _told(choice: Any) -> Any:
    return choice if choice is None or isinstance(choice, str) else choice.model_dump()


def _usage(output: RequestOutput, num_thought: int) -> Fields:
    num_prompt, num_answer = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
    return {
        "input_tokens": num_prompt,
        "input_tokens_details": {"cached_tokens": output.metrics.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": num_answer,
        "output_tokens_details": {"reasoning_tokens": num_thought},
        "total_tokens": num_prompt + num_answer,
    }
