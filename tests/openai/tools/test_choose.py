"""The parser goes with what the chat template tells the model to write."""

import pytest

from jaxserve.errors import ConfigError
from jaxserve.openai.tools.choose import CHOICES, parser_name

# The sentences by which published templates ask for calls.
QWEN = (
    'return a json object within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments"'
)
LLAMA = 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
LLAMA_TAG = "{{- '<|python_tag|>' + tool_call.name }}" + LLAMA
PYTHONIC = (
    "in the format of [func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]"
)
QWEN_CODER = "<tool_call>\n<function=example_function_name>"
PLAIN = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN, "hermes"),
        (LLAMA, "llama3_json"),
        (LLAMA_TAG, "llama3_json"),
        (PYTHONIC, "pythonic"),
        (QWEN_CODER, None),
        (PLAIN, None),
        (None, None),
    ],
)
def test_auto_goes_by_the_template(template: str | None, expected: str | None) -> None:
    assert parser_name("auto", template) == expected


def test_a_name_is_taken_whatever_the_template_says() -> None:
    for name in CHOICES:
        if name not in ("auto", "none"):
            assert parser_name(name, QWEN) == name
    assert parser_name("none", QWEN) is None


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(ConfigError, match="hermes"):
        parser_name("hermse", None)
