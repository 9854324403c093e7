"""What is told of a body that cannot be read: the field at fault, by the name that the caller gave it."""

import pytest
from pydantic import ValidationError

from jaxserve.openai.chat import ChatBody
from jaxserve.openai.completion import CompletionBody
from jaxserve.openai.errors import ApiError, of_validation
from jaxserve.openai.responses import ResponseBody
from jaxserve.openai.score import RerankBody
from jaxserve.openai.turn import Dialect

NAN = float("nan")
FUNCTION = {"type": "function", "name": "f"}
HI = [{"role": "user", "content": "hi"}]
SAYING = {CompletionBody: {"prompt": "hi"}, ChatBody: {"messages": HI}, ResponseBody: {"input": "hi"}}


@pytest.mark.parametrize(
    ("model", "body", "param", "told"),
    [
        (CompletionBody, {"prompt": 3}, "prompt", "none of the forms"),
        (CompletionBody, {"prompt": ["a", 3]}, "prompt", "none of the forms"),
        (CompletionBody, {"prompt": [[1, 2], [3, "x"]]}, "prompt[1][1]", "valid integer"),
        (CompletionBody, {"prompt": "x", "n": "2"}, "n", "valid integer"),
        (CompletionBody, {}, "prompt", "required"),
        (ChatBody, {"messages": HI, "temprature": 1}, "temprature", "did you mean 'temperature'"),
        (ChatBody, {"messages": [{"content": "x"}, {"content": "y"}]}, "messages[0].role", "required"),
        (ChatBody, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "none of the forms"),
        (ChatBody, {"messages": HI, "tool_choice": "must"}, "tool_choice", "none of the forms"),
        (ChatBody, {"messages": HI, "tool_choice": {"function": {"name": 3}}}, "tool_choice.function.name", "string"),
        (ChatBody, {"messages": HI, "tools": [{"function": {}}]}, "tools[0].function.name", "required"),
        (ResponseBody, {"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name", "required"),
        (ResponseBody, {"input": [{"role": "nobody", "content": "x"}]}, "input[0].role", "should be 'user'"),
        (ResponseBody, {"input": "x", "metadata": {"a": 1}}, "metadata.a", "string"),
        (
            ResponseBody,
            {"input": "x", "tools": [FUNCTION | {"parameters": {"a": [NAN]}}]},
            "tools[0].parameters",
            "finite",
        ),
        (ResponseBody, {"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type", "should be 'function'"),
        (RerankBody, {"query": "x", "documents": ["y"], "top_n": -1}, "top_n", "greater than or equal to 0"),
        (ChatBody, {"messages": HI, "stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
        (CompletionBody, {"prompt": "x", "stream_options": {}}, "stream_options", "stream: true"),
        (ChatBody, {"messages": HI, "chat_template_kwargs": {"a": NAN}}, "chat_template_kwargs", "finite"),
        (ChatBody, {"messages": HI, "structured_outputs": {"json": {"const": NAN}}}, "structured_outputs", "finite"),
    ],
)
def test_the_field_at_fault_is_named(model, body, param, told):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    error = of_validation(caught.value)
    assert (error.param, told in error.message) == (param, True), error.message
    assert error.message.count("\n") == 0


@pytest.mark.parametrize(
    ("model", "body", "message"),
    [
        (CompletionBody, {"n": 2, "temperature": -1}, "temperature=-1.0 must be"),
        (CompletionBody, {"logprobs": 1, "prompt_logprobs": 30}, "prompt_logprobs=30 must be"),
        (CompletionBody, {"stop": "x", "stop_token_ids": [-1]}, "stop_token_ids must hold"),
        (ChatBody, {"logprobs": True, "top_logprobs": 21}, "top_logprobs=21 must be"),
        (ChatBody, {"max_completion_tokens": 0}, "max_completion_tokens=0 must be"),
        (ResponseBody, {"max_output_tokens": 0}, "max_output_tokens=0 must be"),
        (CompletionBody, {"structured_outputs": {"rgex": "a"}}, "unknown option of structured_outputs 'rgex'"),
    ],
)
def test_an_option_out_of_range_is_told_by_its_name_in_this_body(model, body, message):
    asked = model.model_validate(SAYING[model] | body)
    with pytest.raises(ApiError, match=message) as caught:
        asked.params() if isinstance(asked, CompletionBody) else asked.turn(Dialect())
    assert caught.value.param == max(body)
