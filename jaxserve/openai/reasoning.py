"""Thoughts and answer of a reasoning model: `<think>...</think>` taken apart as the text comes."""

import dataclasses
import enum

from jaxserve.errors import ConfigError

OPEN, CLOSE = "<think>", "</think>"
# vLLM's names -> whether an answer is thought from its first character on, even if no tag says so.
PARSERS = {"deepseek_r1": True, "qwen3": False}


class Where(enum.Enum):
    """How far an answer has come."""

    START = enum.auto()  # nothing but spaces yet, or the beginning of a tag
    THOUGHT = enum.auto()
    ANSWER = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """What became certain: more of the thoughts, more of the answer."""

    thought: str = ""
    answer: str = ""


class ReasoningParser:
    """Splits the text of one answer. Both parts are as the model wrote them, without the tags.

    Some templates write `<think>` into the prompt, so that the answer begins inside; or an empty pair of tags, so that
    it begins after them. The prompt's end says so. Thoughts that never end are thoughts.

    Raises:
      ConfigError: there is no parser of this name.
    """

    def __init__(self, name: str, prompt: str | None):
        if name not in PARSERS:
            raise ConfigError(f"reasoning_parser={name!r} is unknown", remedy=f"Choose from {', '.join(PARSERS)}")
        end = (prompt or "")[-64:].rstrip()
        self._is_thought = PARSERS[name] or end.endswith(OPEN)  # unless a tag says otherwise
        self._where = Where.ANSWER if end.endswith(CLOSE) else Where.START
        self._held = ""

    @property
    def is_thinking(self) -> bool:
        """Whether the text so far ends inside of thoughts, or may yet begin with some."""
        return self._where is not Where.ANSWER

    def push(self, text: str) -> Split:
        """What became certain with this text."""
        self._held += text
        if self._where is Where.START:
            self._begin()
        if self._where is Where.START:
            return Split()
        thought = ""
        if self._where is Where.THOUGHT:
            thought, tag, rest = self._held.partition(CLOSE)
            if not tag:
                keep = next(size for size in range(len(CLOSE) - 1, -1, -1) if thought.endswith(CLOSE[:size]))
                thought, self._held = self._held[: len(thought) - keep], thought[len(thought) - keep :]
                return Split(thought)
            self._where, self._held = Where.ANSWER, rest
        answer, self._held = self._held, ""
        return Split(thought, answer)

    def finish(self) -> Split:
        """What is left at the end."""
        held, self._held = self._held, ""
        is_thought = self._where is Where.THOUGHT or (self._where is Where.START and self._is_thought)
        return Split(thought=held) if is_thought else Split(answer=held)

    def _begin(self) -> None:
        """Leave START as soon as the first characters say whether there is a tag."""
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._where, self._held = Where.THOUGHT, begun[len(OPEN) :]
        elif not OPEN.startswith(begun):
            self._where = Where.THOUGHT if self._is_thought else Where.ANSWER
