"""Tool-call parsers: a model's text in, pieces of an answer out, each as soon as no later text can change it.

A parser's rules are a generator that takes one character per `yield`, and "" at the end. It cannot see where the text
was cut, so streamed and whole answers are the same by construction. Each character is handed out once: as text, as
arguments, or (a tag, a comma between calls) not at all.
"""

import dataclasses
from collections.abc import Callable, Generator
from typing import Protocol, TypeVar

from jaxserve.openai.ids import new_id


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """More of what the model says."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; `index` counts the calls of an answer."""

    index: int
    id: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments, as the model wrote them; together a JSON object, if the model wrote one."""

    index: int
    text: str


Piece = Text | CallStart | Arguments

T = TypeVar("T")
Rules = Generator[None, str, T]


class ToolParser(Protocol):
    """Text of one answer -> pieces. Never raises, whatever the text."""

    def push(self, text: str) -> list[Piece]:
        """What became certain with this text."""
        ...

    def finish(self) -> list[Piece]:
        """What is left at the end: an unfinished call is text."""
        ...


def new_call_id() -> str:
    """An id like OpenAI's."""
    return new_id("call_")[:29]


class Sink:
    """What rules have read, and what becomes of it. `held` ends with the character that was read last."""

    def __init__(self, new_id: Callable[[], str]):
        self.held: list[str] = []
        self._pieces: list[Piece] = []
        self._parts: list[str] = []  # of the text or arguments to be handed out next
        self._are_arguments = False
        self._new_id = new_id
        self._index = -1

    @property
    def has_called(self) -> bool:
        """Whether a call has begun."""
        return self._index >= 0

    def holds(self) -> str:
        """What is held as one text."""
        return "".join(self.held)

    def text(self, keep: int = 0) -> None:
        """Hand out what is held, but for the last `keep` characters, as text."""
        self._turn(to_arguments=False)
        cut = len(self.held) - keep
        self._parts += self.held[:cut]
        del self.held[:cut]

    def drop(self, keep: int = 0) -> None:
        """Forget what is held, but for the last `keep` characters."""
        del self.held[: len(self.held) - keep]

    def start(self, name: str) -> None:
        """Begin the next call."""
        self._flush()
        self._index += 1
        self._pieces.append(CallStart(self._index, self._new_id(), name))

    def arguments(self, text: str | None = None) -> None:
        """Hand out what is held as arguments of the call; or a text of which nothing is held."""
        self._turn(to_arguments=True)
        if text is None:
            self._parts += self.held
            self.held.clear()
        else:
            self._parts.append(text)

    def take(self) -> list[Piece]:
        """The pieces since it was last asked."""
        self._flush()
        pieces, self._pieces = self._pieces, []
        return pieces

    def _turn(self, to_arguments: bool) -> None:
        if to_arguments != self._are_arguments:
            self._flush()
        self._are_arguments = to_arguments

    def _flush(self) -> None:
        """Make one piece of the parts."""
        if self._parts:
            text = "".join(self._parts)
            self._pieces.append(Arguments(self._index, text) if self._are_arguments else Text(text))
            self._parts.clear()


class RuleParser:
    """A ToolParser that follows rules."""

    def __init__(self, rules: Callable[[Sink], Rules[None]], *, new_id: Callable[[], str] = new_call_id):
        self._sink = Sink(new_id)
        self._rules = rules(self._sink)
        next(self._rules)

    def push(self, text: str) -> list[Piece]:
        """See ToolParser."""
        for char in text:
            self._sink.held.append(char)
            self._rules.send(char)
        return self._sink.take()

    def finish(self) -> list[Piece]:
        """See ToolParser."""
        try:
            self._rules.send("")
        except StopIteration:
            pass
        self._sink.text()
        return self._sink.take()
