"""/v1/responses: bodies -> turns of conversations."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from jaxserve.openai.constraint import Constraint, GuidedFields, only_one, schema_in
from jaxserve.openai.errors import ApiError
from jaxserve.openai.fields import NEUTRAL, Body, JsonObject, MetaFields, SamplingFields
from jaxserve.openai.messages import Message
from jaxserve.openai.response_items import AnyItem, messages_of
from jaxserve.openai.tools.choice import (
    AllowedChoice,
    AllowedTools,
    Function,
    FunctionName,
    Mode,
    NamedTool,
    Tool,
    ToolChoice,
    tool_use,
)
from jaxserve.openai.turn import Dialect, Turn, turn_of
from jaxserve.request import SamplingParams

PREFIX = "resp_"
LOGPROBS = "message.output_text.logprobs"


class FunctionTool(Function):
    """A tool, written flat."""

    type: Literal["function"]


class NamedFunction(Body):
    """`tool_choice`: this function."""

    type: Literal["function"]
    name: str


class AllowedFunctions(Body):
    """`tool_choice`: one of these."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedFunction]


class TextFormat(Body):
    """What the answer must look like. `schema` is not a name that pydantic leaves free."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    json_schema: Annotated[JsonObject | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None

    def constraint(self) -> Constraint | None:
        """None: anything goes.

        Raises:
          ApiError: the schema is missing.
        """
        if self.type == "json_schema":
            return {"json": schema_in({"schema": self.json_schema}, "text.format")}
        return {"json_object": True} if self.type == "json_object" else None


class TextOptions(Body):
    """`text`."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class Reasoning(Body):
    """`reasoning`. Thoughts are handed out in plain, so nobody needs a summary."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "summary": ("auto",),
        "generate_summary": ("auto",),
        "context": ("auto",),
        "mode": ("standard",),
    }

    effort: Annotated[str, Field(max_length=64)] | None = None


class ResponseStreamOptions(Body):
    """Of `stream_options`; nothing is ever made longer to hide its length."""

    include_obfuscation: Literal[False] = False


class ResponseBody(SamplingFields, MetaFields, GuidedFields):
    """The body of a request."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **NEUTRAL,
        "background": (False,),
        "truncation": ("disabled",),
        "conversation": (),
        "prompt": (),
        "max_tool_calls": (),
        "context_management": ([],),
        "moderation": (),
        "prompt_cache_options": ({},),
    }

    model: str | None = None
    input: str | list[AnyItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Mode | NamedFunction | AllowedFunctions | None = None
    parallel_tool_calls: bool = True
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: int | None = None
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    chat_template_kwargs: JsonObject | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities come with the text."""
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())

    @property
    def said(self) -> list[Message]:
        """What this request adds to the conversation."""
        return [Message(role="user", content=self.input)] if isinstance(self.input, str) else messages_of(self.input)

    def turn(self, dialect: Dialect, history: Sequence[Message] = ()) -> Turn:
        """What is asked of a model that writes like this, after the conversation so far.

        Raises:
          ApiError: a field is out of range, cannot be obeyed, or contradicts another.
        """
        if not self.input and isinstance(self.input, list):
            raise ApiError("input must hold at least one item", param="input")
        if self.n not in (None, 1):
            raise ApiError("a response is one answer, so n other than 1 is not supported", param="n")
        if self.max_tokens is not None:
            raise ApiError("max_tokens is not supported; here it is max_output_tokens", param="max_tokens")
        system = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        form = self.text and self.text.format and self.text.format.constraint()
        asked = only_one(**{"text.format": form, "structured_outputs": self.structured_outputs}, **self.guided())
        tools = tool_use(
            [Tool(function=tool) for tool in self.tools or ()],
            _choice(self.tool_choice),
            dialect.tool_parser,
            parallel=self.parallel_tool_calls,
        )
        if self.wants_logprobs and (tools.shown or dialect.reasoning_parser is not None):
            raise ApiError(
                "log-probabilities cannot be told apart where answers have calls or thoughts; /v1/chat/completions "
                "tells them for all tokens",
                param="top_logprobs",
            )
        return turn_of(
            dialect,
            [*system, *history, *self.said],
            tools,
            asked,
            sampling=self._sampling,
            variables=self.chat_template_kwargs,
            effort=None if self.reasoning is None else self.reasoning.effort,
        )

    def _sampling(self, **more: Any) -> SamplingParams:
        if self.wants_logprobs:
            more["logprobs"] = self.top_logprobs or 0
        called = {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}
        return self.sampling_params(called=called, max_tokens=self.max_output_tokens, **more)


def _choice(choice: Mode | NamedFunction | AllowedFunctions | None) -> ToolChoice | None:
    """The same as chat has it."""
    match choice:
        case NamedFunction():
            return NamedTool(function=FunctionName(name=choice.name))
        case AllowedFunctions():
            tools = [NamedTool(function=FunctionName(name=tool.name)) for tool in choice.tools]
            return AllowedChoice(type="allowed_tools", allowed_tools=AllowedTools(mode=choice.mode, tools=tools))
        case _:
            return choice
