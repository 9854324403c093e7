"""Which parser reads a model's calls."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from jaxserve.errors import ConfigError
from jaxserve.openai.tools import hermes, llama3, pythonic
from jaxserve.openai.tools.parser import Rules, Sink

# By the names that vLLM's --tool-call-parser knows.
PARSERS: Mapping[str, Callable[[Sink], Rules[None]]] = MappingProxyType(
    {
        "hermes": hermes.rules,
        "llama3_json": llama3.rules,
        "llama4_json": llama3.rules,
        "llama4_pythonic": pythonic.rules,
        "pythonic": pythonic.rules,
    }
)
CHOICES = ("auto", "none", *PARSERS)
TAGS = (hermes.OPEN, hermes.CLOSE, llama3.TAG, pythonic.OPEN, pythonic.CLOSE)
_OTHER_FORMS = ("<function=", "<arg_key>")  # inside of <tool_call>: Qwen3-Coder's and GLM's own
_SIGNS = (  # what a template tells the model to write -> who reads that
    ("func_name1(", "pythonic"),
    ("<tool_call>", "hermes"),
    ('"parameters": dictionary', "llama3_json"),
    ("<|python_tag|>", "llama3_json"),
)


def parser_name(option: str, template: str | None) -> str | None:
    """The parser for `--tool-call-parser option`; "auto" goes by the chat template. None: calls are not looked for.

    Raises:
      ConfigError: there is no such parser.
    """
    if option not in CHOICES:
        raise ConfigError(f"tool_call_parser={option!r} is unknown", remedy=f"Choose from {', '.join(CHOICES)}")
    if option != "auto":
        return None if option == "none" else option
    if template is None or any(sign in template for sign in _OTHER_FORMS):
        return None
    return next((name for sign, name in _SIGNS if sign in template), None)
