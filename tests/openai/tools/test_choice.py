"""`tools` and `tool_choice`: who is shown, what is forced, and what is refused."""

import pytest

from jaxserve.openai.errors import ApiError
from jaxserve.openai.tools.choice import AllowedChoice, AllowedTools, Function, FunctionName, NamedTool, Tool, tool_use
from jaxserve.openai.tools.parser import CallStart
from jaxserve.openai.tools.schema import NO_PARAMETERS

TOOLS = [Tool(function=Function(name=name, description=f"Does {name}.", strict=True)) for name in ("f", "g")]


def named(name):
    return NamedTool(function=FunctionName(name=name))


def allowed(mode, *names):
    tools = AllowedTools(mode=mode, tools=[named(name) for name in names])
    return AllowedChoice(type="allowed_tools", allowed_tools=tools)


def names_of(use):
    return [tool["function"]["name"] for tool in use.shown]


def test_the_model_decides_unless_it_is_told():
    use = tool_use(TOOLS, None, "hermes")
    assert use.is_auto
    assert names_of(use) == ["f", "g"]
    assert use.shown[0] == {"type": "function", "function": {"name": "f", "description": "Does f."}}
    pieces = use.make_parser().push('<tool_call>{"name": "f", "arguments": {}}')
    assert isinstance(pieces[0], CallStart)


def test_without_tools_or_with_none_nobody_looks_for_calls():
    for use in (tool_use([], None, "hermes"), tool_use([], "auto", None), tool_use(TOOLS, "none", None)):
        assert (use.shown, use.schema, use.make_parser) == ((), None, None)


def test_a_named_function_has_its_arguments_forced():
    use = tool_use(TOOLS, named("g"), None)
    assert (use.name, use.schema, names_of(use)) == ("g", dict(NO_PARAMETERS), ["g"])
    assert not use.is_auto


def test_required_leaves_any_of_them():
    use = tool_use(TOOLS, "required", None, parallel=False)
    forced = [each["properties"]["name"]["const"] for each in use.schema["items"]["anyOf"]]
    assert (forced, use.schema["maxItems"], use.name) == (["f", "g"], 1, "")


def test_some_can_be_allowed():
    assert names_of(tool_use(TOOLS, allowed("auto", "g"), "hermes")) == ["g"]
    assert len(tool_use(TOOLS, allowed("required", "g"), None).schema["items"]["anyOf"]) == 1


@pytest.mark.parametrize(
    ("tools", "choice", "told"),
    [
        (TOOLS, None, "--tool-call-parser"),
        (TOOLS, allowed("auto", "f"), "--tool-call-parser"),
        ([], "required", "needs tools"),
        (TOOLS, named("h"), "'h' is not among"),
        (TOOLS, allowed("required", "h"), "'h' is not among"),
        (TOOLS, allowed("required"), "needs tools"),
        ([TOOLS[0], TOOLS[0]], "none", "same name"),
    ],
)
def test_what_cannot_be_done_is_refused(tools, choice, told):
    with pytest.raises(ApiError, match=told):
        tool_use(tools, choice, None)
