"""Calls that the model was made to write by a grammar: no tags, only JSON."""

from jaxserve.openai.tools.call import NotACall, call, spaces
from jaxserve.openai.tools.parser import Arguments, CallStart, Piece, Rules, Sink, new_call_id


def rules(sink: Sink) -> Rules[None]:
    """`[{"name": "f", "parameters": {...}}, ...]`, as `schema.any_of` asks for; what is not is text."""
    char = yield
    try:
        char = yield from spaces(char)
        if char != "[":
            raise NotACall(char)
        while char != "]":
            char = yield from spaces((yield))
            char = yield from call(sink, char)
            char = yield from spaces(char)
            if char not in (",", "]"):
                raise NotACall(char)
        sink.drop()
        char = yield from spaces((yield))
    except NotACall as fault:
        sink.text(keep=len(fault.char))
    if sink.has_called and not sink.holds().strip():
        sink.drop()
    while True:
        sink.text()
        yield


class OneCall:
    """A ToolParser where the whole text is the arguments of one known function."""

    def __init__(self, name: str):
        self._name = name
        self._has_begun = False

    def push(self, text: str) -> list[Piece]:
        """See ToolParser."""
        pieces: list[Piece] = []
        if text and not self._has_begun:
            pieces.append(CallStart(0, new_call_id(), self._name))
            self._has_begun = True
        return [*pieces, Arguments(0, text)] if text else pieces

    def finish(self) -> list[Piece]:
        """See ToolParser."""
        return []
