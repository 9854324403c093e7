"""Llama 3.1 to 3.3: `{"name": "f", "parameters": {...}}`, perhaps after `<|python_tag|>`; several with `;` between."""

from jaxserve.openai.tools.call import NotACall, call, find, spaces
from jaxserve.openai.tools.parser import Rules, Sink

TAG = "<|python_tag|>"


def rules(sink: Sink) -> Rules[None]:
    """Any object with a name and parameters is a call, as no tag is required; all else is text."""
    char = yield
    while char:
        char = yield from spaces(char)
        tag = yield from find(sink, (TAG, "{"), char)
        if not tag:
            break
        try:
            char = "{" if tag == "{" else (yield from spaces((yield)))
            char = yield from call(sink, char)
            char = yield from spaces(char)
            if char == ";":
                char = yield from spaces((yield))
        except NotACall as fault:
            char = fault.char
            sink.text(keep=len(char))
    if sink.has_called and not sink.holds().strip(" \t\n\r;"):
        sink.drop()
