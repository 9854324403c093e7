"""Messages of a conversation: OpenAI's form -> the one that chat templates know."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from jaxserve.openai.errors import ApiError
from jaxserve.openai.fields import Body

Role = Annotated[str, Field(min_length=1, max_length=64)]


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """What a model would not do, sent back to it."""

    type: Literal["refusal"]
    refusal: str


class FunctionCall(Body):
    """Which function, and with what."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Body):
    """A call that an earlier answer made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # left over in clients that put an answer together from a stream


class Message(Body):
    """One turn of a conversation."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"annotations": ([],), "audio": (), "function_call": ()}

    role: Role
    content: str | list[TextPart | RefusalPart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None  # what vLLM called `reasoning` once

    @field_validator("content", mode="before")
    @classmethod
    def _only_text(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("text", "refusal"):
                raise ValueError(f"parts of type {str(kind)[:40]!r} are not supported; this server reads text only")
        return content

    @property
    def text(self) -> str | None:
        """All its text; None if it has none."""
        if isinstance(self.content, list):
            return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in self.content)
        return self.refusal if self.content is None else self.content


def for_template(messages: Sequence[Message]) -> tuple[dict[str, Any], ...]:
    """As chat templates of Hugging Face models want them: content is one text, arguments of calls are objects.

    Raises:
      ApiError: there is nothing to say, or a message says nothing.
    """
    if not messages:
        raise ApiError("there are no messages", param="messages")
    return tuple(_for_template(message, f"messages[{index}]") for index, message in enumerate(messages))


def _for_template(message: Message, where: str) -> dict[str, Any]:
    text = message.text
    if text is None and message.role != "assistant":
        raise ApiError(f"{where}.content is missing", param=f"{where}.content")
    made: dict[str, Any] = {"role": message.role, "content": text or ""}
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = [_call_for_template(call) for call in message.tool_calls]
    thought = message.reasoning if message.reasoning is not None else message.reasoning_content
    if thought is not None:
        made |= {"reasoning": thought, "reasoning_content": thought}
    return made


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": _object(call.function.arguments)}
    made: dict[str, Any] = {"type": "function", "function": function}
    return made if call.id is None else {"id": call.id} | made


def _object(arguments: str | dict[str, Any]) -> Any:
    """Arguments as an object; what a model wrote wrongly stays the text that it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
