"""One text, cut in every way: what parsers hand out must not depend on it."""

import dataclasses
import random
from collections.abc import Callable, Iterable, Sequence

from jaxserve.openai.tools.parser import Arguments, CallStart, Piece, RuleParser, Rules, Sink, Text, ToolParser

Rulebook = Callable[[Sink], Rules[None]]


@dataclasses.dataclass
class Answer:
    """Pieces put together: `text` is all text, `calls` are (name, arguments)."""

    text: str = ""
    calls: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    order: list[str | int] = dataclasses.field(default_factory=list)  # text and calls as they followed one another


def put_together(pieces: Iterable[Piece]) -> Answer:
    """What a client would make of the pieces."""
    answer = Answer()
    for piece in pieces:
        match piece:
            case Text(text):
                assert text, "an empty piece"
                answer.text += text
                if answer.order and isinstance(answer.order[-1], str):
                    answer.order[-1] += text
                else:
                    answer.order.append(text)
            case CallStart(index, name=name):
                assert index == len(answer.calls), "calls are counted from 0"
                answer.calls.append((name, ""))
                answer.order.append(index)
            case Arguments(index, text):
                assert text, "an empty piece"
                assert index == len(answer.calls) - 1, "arguments of a call that has ended"
                answer.calls[index] = (answer.calls[index][0], answer.calls[index][1] + text)
    return answer


def parser(rules: Rulebook) -> ToolParser:
    """A fresh one."""
    return RuleParser(rules)


def whole(rules: Rulebook, text: str) -> Answer:
    """The answer of a text that comes at once."""
    return in_pieces(rules, [text])


def in_pieces(rules: Rulebook, texts: Sequence[str]) -> Answer:
    """The answer of a text that comes in pieces."""
    reader = parser(rules)
    pieces = [piece for text in texts for piece in reader.push(text)]
    return put_together([*pieces, *reader.finish()])


def check_cuts(rules: Rulebook, text: str, rng: random.Random, times: int = 3) -> Answer:
    """However the text is cut, the answer is that of the whole; returns it."""
    expected = whole(rules, text)
    assert in_pieces(rules, list(text)) == expected
    for _ in range(times):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(6)))
        texts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert in_pieces(rules, texts) == expected, texts
    return expected
