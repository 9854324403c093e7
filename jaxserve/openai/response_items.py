"""Items of /v1/responses that make up a conversation -> messages."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Tag, field_validator

from jaxserve.openai.fields import Body
from jaxserve.openai.messages import FunctionCall, Message, ToolCall

_PARTS = ("input_text", "output_text", "refusal", "text", "reasoning_text", "summary_text")
Status = Literal["in_progress", "completed", "incomplete"]


class Part(Body):
    """Text of an item; what an answer had beside it may be sent back."""

    type: Literal["input_text", "output_text", "refusal", "text", "reasoning_text", "summary_text"]
    text: str = ""
    refusal: str = ""
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None

    @property
    def said(self) -> str:
        """Its text."""
        return self.refusal if self.type == "refusal" else self.text


Content = str | list[Part]


class Item(Body):
    """What all items may have."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "caller": (),
        "namespace": (),
        "async": (False,),
        "encrypted_content": ("",),
    }

    id: str | None = None
    status: Status | None = None

    @field_validator("content", "output", mode="before", check_fields=False)
    @classmethod
    def _only_text(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in _PARTS:
                raise ValueError(f"parts of type {str(kind)[:40]!r} are not supported; this server reads text only")
        return content


class MessageItem(Item):
    """Something that was said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: str | None = None


class CallItem(Item):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class ResultItem(Item):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    name: str | None = None


class ReasoningItem(Item):
    """Thoughts of an earlier answer, in plain."""

    type: Literal["reasoning"]
    summary: list[Part] | None = None
    content: list[Part] | None = None


def _kind(item: Any) -> str:
    """The tag of its class: no tag is a name that a field could have, or errors would show it."""
    kind = item.get("type") if isinstance(item, Mapping) else getattr(item, "type", None)
    return f"{kind or 'message'}-item"


AnyItem = Annotated[
    Annotated[MessageItem, Tag("message-item")]
    | Annotated[CallItem, Tag("function_call-item")]
    | Annotated[ResultItem, Tag("function_call_output-item")]
    | Annotated[ReasoningItem, Tag("reasoning-item")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message="items are of type message, function_call, function_call_output or reasoning here",
    ),
]


def messages_of(items: Sequence[AnyItem]) -> list[Message]:
    """One message for each thing that was said. Thoughts, text and calls of one answer belong together."""
    messages = list[Message]()
    thought = ""
    for item in items:
        last = messages[-1] if messages and messages[-1].role == "assistant" else None
        match item:
            case ReasoningItem():
                thought += _text(item.content or [])
            case CallItem():
                function = FunctionCall(name=item.name, arguments=item.arguments)
                if last is None or thought:
                    messages.append(last := _answer("", thought))
                last.tool_calls = [*(last.tool_calls or ()), ToolCall(id=item.call_id, function=function)]
                thought = ""
            case ResultItem():
                said = _text(item.output)
                messages.append(Message(role="tool", tool_call_id=item.call_id, content=said, name=item.name))
            case MessageItem(role="assistant"):
                messages.append(_answer(_text(item.content), thought))
                thought = ""
            case MessageItem():
                messages.append(Message(role=item.role, content=_text(item.content)))
    return messages


def _answer(text: str, thought: str) -> Message:
    return Message(role="assistant", content=text, reasoning=thought or None)


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(part.said for part in content)
