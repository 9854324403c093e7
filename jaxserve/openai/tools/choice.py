"""`tools` and `tool_choice` -> what the model is shown, what it is made to write, and who reads it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from jaxserve.openai.errors import ApiError
from jaxserve.openai.fields import Body, JsonObject
from jaxserve.openai.tools import forced
from jaxserve.openai.tools.choose import PARSERS
from jaxserve.openai.tools.parser import RuleParser, ToolParser
from jaxserve.openai.tools.schema import any_of, parameters

Mode = Literal["none", "auto", "required"]


class Function(Body):
    """What a model may call. Schemas are shown to the model, and obeyed where a call is forced."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _are_named(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value and value.get("type", "object") != "object":
            raise ValueError("arguments have names, so this must be a JSON schema of type 'object'")
        return value


class Tool(Body):
    """Only functions are known."""

    type: Literal["function"] = "function"
    function: Function


class FunctionName(Body):
    """Which one."""

    name: str


class NamedTool(Body):
    """`tool_choice`: this function."""

    type: Literal["function"] = "function"
    function: FunctionName


class AllowedTools(Body):
    """Some of the tools, and whether one must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedChoice(Body):
    """`tool_choice`: one of these."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Mode | NamedTool | AllowedChoice


@dataclasses.dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools in one turn. Without any, all fields are empty."""

    shown: tuple[dict[str, Any], ...] = ()  # to the chat template
    schema: dict[str, Any] | None = None  # of the whole answer, where a call is forced
    name: str = ""  # of the only function that may be called
    make_parser: Callable[[], ToolParser] | None = None
    parallel: bool = True  # whether an answer may have several calls

    @property
    def is_auto(self) -> bool:
        """Whether the model decides."""
        return self.make_parser is not None and self.schema is None


def tool_use(
    tools: Sequence[Tool], choice: ToolChoice | None, parser_name: str | None, *, parallel: bool = True
) -> ToolUse:
    """Understand the two fields. `parser_name`: how the model writes calls by itself, None if that is not known.

    Raises:
      ApiError: they contradict each other, or calls could not be read.
    """
    functions = {tool.function.name: tool.function for tool in tools}
    if len(functions) < len(tools):
        raise ApiError("two tools have the same name", param="tools")
    mode, names = _mode(choice, list(functions))
    unknown = [name for name in names if name not in functions]
    if unknown or (mode == "required" and not names):
        told = f"{unknown[0][:80]!r} is not among the tools" if unknown else "it needs tools"
        raise ApiError(f"tool_choice: {told}", param="tool_choice")
    if mode == "none" or not names:
        return ToolUse()
    allowed = [functions[name] for name in names]
    shown = tuple(_shown(function) for function in allowed)
    if isinstance(choice, NamedTool):
        name = names[0]
        return ToolUse(shown, parameters(_plain(allowed[0])), name, lambda: forced.OneCall(name), parallel=False)
    if mode == "required":
        schema = any_of([_plain(function) for function in allowed], parallel=parallel)
        return ToolUse(shown, schema, "", lambda: RuleParser(forced.rules), parallel)
    if parser_name is None:
        raise ApiError(
            "this server does not look for tool calls in this model's answers; start it with --tool-call-parser and "
            "without --no-enable-auto-tool-choice, or send tool_choice 'required' or 'none'",
            param="tool_choice",
            code="unsupported_field",
        )
    rules = PARSERS[parser_name]
    return ToolUse(shown, None, "", lambda: RuleParser(rules), parallel)


def _mode(choice: ToolChoice | None, names: list[str]) -> tuple[Mode, list[str]]:
    """What is to be done, and with which functions."""
    match choice:
        case NamedTool():
            return "required", [choice.function.name]
        case AllowedChoice():
            allowed = choice.allowed_tools
            return allowed.mode, list(dict.fromkeys(tool.function.name for tool in allowed.tools))
        case None:
            return ("auto" if names else "none"), names
        case _:
            return choice, names


def _plain(function: Function) -> dict[str, Any]:
    return {"name": function.name, "parameters": function.parameters}


def _shown(function: Function) -> dict[str, Any]:
    """OpenAI's form, in the order in which models have seen it."""
    made = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {"type": "function", "function": {key: value for key, value in made.items() if value is not None}}
