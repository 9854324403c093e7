"""Hermes, Qwen 2.5 and Qwen 3: `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, one after the other."""

from jaxserve.openai.tools.call import NotACall, call, find, spaces
from jaxserve.openai.tools.parser import Rules, Sink

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def rules(sink: Sink) -> Rules[None]:
    """Spaces before, between and after calls are part of the form; the closing tag may be missing."""
    char = yield
    is_inside = False  # a call has been read, its tag not yet closed
    while char:
        char = yield from spaces(char)
        tag = yield from find(sink, (OPEN, CLOSE), char)
        if tag == CLOSE:
            if is_inside:
                sink.drop()
            else:
                sink.text()
            is_inside, char = False, (yield)
            continue
        if not tag:
            break
        try:
            char = yield from spaces((yield))
            char = yield from call(sink, char, bare=True)
            is_inside = True
        except NotACall as fault:
            char = fault.char
            sink.text(keep=len(char))
    if sink.has_called and CLOSE.startswith(sink.holds().lstrip()):
        sink.drop()
