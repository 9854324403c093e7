"""A turn of a conversation: what the model is given, and how what it says is read."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.errors import CheckpointError
from jaxserve.openai.constraint import Asked, told_with
from jaxserve.openai.errors import ApiError
from jaxserve.openai.messages import Message, for_template
from jaxserve.openai.reader import Reader
from jaxserve.openai.reasoning import CLOSE, OPEN, ReasoningParser
from jaxserve.openai.tools.choice import ToolUse
from jaxserve.openai.tools.choose import TAGS, parser_name
from jaxserve.request import SamplingParams
from jaxserve.tokenizer import Tokenizer

_NOT_FOR_CALLERS = frozenset(("messages", "tools", "add_generation_prompt", "continue_final_message"))


@dataclasses.dataclass(frozen=True, slots=True)
class Dialect:
    """How a model writes calls and thoughts; by the names of the parsers that read them, None where none does."""

    tool_parser: str | None = None
    reasoning_parser: str | None = None
    has_special_tags: bool = False  # some of the tags are special tokens, left out of the text unless asked for
    template: str = ""

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, *, tool_parser: str = "auto", reasoning_parser: str | None = None):
        """That of a model, with what a server was told.

        Raises:
          ConfigError: there is no parser of this name.
        """
        template = "" if tokenizer is None else tokenizer.chat_template or ""
        tools = parser_name(tool_parser, template)
        tags = (*(TAGS if tools else ()), *((OPEN, CLOSE) if reasoning_parser else ()))
        has_special = tokenizer is not None and any(tokenizer.is_special(tag) for tag in tags)
        return cls(tools, reasoning_parser, has_special, template)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A request for an answer, understood."""

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tools: ToolUse
    reasoning: str | None = None  # the parser of thoughts
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the chat template
    continues: bool = False  # the last message is the beginning of the answer
    form: str = ""  # the field that says what the answer must look like

    def prompt(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The prompt for the engine. May take some time.

        Raises:
          ApiError: the model has no chat template, or it refuses these messages.
        """
        template = tokenizer.chat_template
        if template is None:
            raise ApiError("this model has no chat template; use /v1/completions", code="no_chat_template")
        messages = [dict(message) for message in self.messages]
        for message in messages:  # OpenAI's name for it; most models know only the older one
            if message["role"] == "developer" and "developer" not in template:
                message["role"] = "system"
        variables = dict[str, Any](self.variables)
        if self.tools.shown:
            variables["tools"] = list(self.tools.shown)
        if self.continues:
            variables["add_generation_prompt"] = False
        try:
            text = tokenizer.apply_chat_template(messages, **variables)
        except CheckpointError as error:  # what it cannot do may well be the fault of these messages
            raise ApiError(str(error), param="messages", code="chat_template") from None
        if self.continues:
            text = _open_end(text, messages[-1]["content"])
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}

    def reader(self, prompt: str | None) -> Reader:
        """For the text of one answer. The end of the prompt says whether it begins with thoughts."""
        reasoning = ReasoningParser(self.reasoning, prompt) if self.reasoning is not None else None
        tools = self.tools.make_parser() if self.tools.make_parser is not None else None
        return Reader(reasoning, tools, parallel=self.tools.parallel)


def turn_of(
    dialect: Dialect,
    messages: Sequence[Message],
    tools: ToolUse,
    asked: Asked | None,
    *,
    sampling: Callable[..., SamplingParams],
    variables: Mapping[str, Any] | None = None,
    effort: str | None = None,
    generate: bool = True,
    continues: bool = False,
) -> Turn:
    """A turn in which an answer of the form `asked`, calls and thoughts do not get into each other's way.

    `sampling` makes the options, some of which are given here. `variables`, `effort` and `generate` (whether it ends
    with the beginning of an answer) are for the chat template.

    Raises:
      ApiError: they do, or the template does not know them.
    """
    if asked is not None and tools.shown:
        raise ApiError(
            "an answer cannot both have a given form and call tools; leave one of them out, or send tool_choice 'none'",
            param="tools",
        )
    variables = dict(variables or {})
    taken = _NOT_FOR_CALLERS & variables.keys()
    if taken:
        raise ApiError(f"chat_template_kwargs must not set {min(taken)}", param="chat_template_kwargs")
    if effort is not None:
        if "reasoning_effort" not in dialect.template:
            raise ApiError("this model knows no reasoning_effort", param="reasoning_effort")
        variables["reasoning_effort"] = effort
    if tools.schema is not None:
        asked = Asked("tools", {"json": tools.schema, "whitespace_pattern": " ?"})
    reasoning = dialect.reasoning_parser if asked is None else None  # a form is obeyed from the first token on
    more: dict[str, Any] = {} if asked is None else {"structured_outputs": asked.constraint}
    if dialect.has_special_tags and (tools.is_auto or reasoning is not None):
        more["skip_special_tokens"] = False
    try:
        params = sampling(**more)
    except ApiError as error:
        raise (
            told_with(error.message, asked.field) if asked and error.param == "structured_outputs" else error
        ) from None
    return Turn(
        messages=for_template(messages),
        params=params,
        form="" if asked is None else asked.field,
        tools=tools,
        reasoning=reasoning,
        variables=variables | {"add_generation_prompt": generate},
        continues=continues,
    )


def _open_end(text: str, last: str) -> str:
    """A rendered conversation up to the end of its last message; what the template puts behind it is cut off."""
    said = last.strip()
    begin = text.rfind(said)
    if not said or begin < 0:
        raise ApiError(
            "continue_final_message needs a last message with text that the chat template writes as it is",
            param="continue_final_message",
        )
    whole = last.lstrip()
    return text[:begin] + (whole if text.startswith(whole, begin) else said)
