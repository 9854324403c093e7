"""The text of one answer as it comes -> thoughts, text and calls."""

import dataclasses

from jaxserve.openai.reasoning import ReasoningParser, Split
from jaxserve.openai.tools.parser import Arguments, CallStart, Piece, Text, ToolParser


@dataclasses.dataclass(frozen=True, slots=True)
class Thought:
    """More of what the model thinks."""

    text: str


News = Thought | Piece


class Reader:
    """Takes thoughts out first, then calls. With `parallel=False` calls after the first are left out."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None, *, parallel: bool = True):
        self._reasoning = reasoning
        self._tools = tools
        self._parallel = parallel

    @property
    def is_plain(self) -> bool:
        """Whether all text is just text."""
        return self._reasoning is None and self._tools is None

    def push(self, text: str) -> list[News]:
        """What became certain with this text."""
        split = Split(answer=text) if self._reasoning is None else self._reasoning.push(text)
        return self._read(split)

    def finish(self) -> list[News]:
        """What is left at the end."""
        news = list[News]() if self._reasoning is None else self._read(self._reasoning.finish())
        return news if self._tools is None else news + self._wanted(self._tools.finish())

    def _read(self, split: Split) -> list[News]:
        news: list[News] = [Thought(split.thought)] if split.thought else []
        if not split.answer:
            return news
        return [*news, *([Text(split.answer)] if self._tools is None else self._wanted(self._tools.push(split.answer)))]

    def _wanted(self, pieces: list[Piece]) -> list[Piece]:
        if self._parallel:
            return pieces
        return [piece for piece in pieces if not isinstance(piece, CallStart | Arguments) or piece.index == 0]
