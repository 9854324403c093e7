"""The search: from what the rule says to something better, one number at a time."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

MOST_TRIES = 12  # for one question
Question = tuple[str, str]  # (chip, question), as `jaxserve.pallas_kernels.tuning` names them


class Judged(NamedTuple):
    """What some choices cost, and what was asked of the rules on the way."""

    costs: dict[str, float]  # by length or the like; less is better
    answers: dict[Question, Any]


class RefusedError(Exception):
    """These choices cannot be compiled or run."""


class Judge(NamedTuple):
    """`cost` says what choices (question -> answer) cost. Raises: RefusedError."""

    cost: Callable[[Mapping[str, Any]], Judged]
    by: str  # "schedule" or "timing"
    model: str
    versions: dict[str, str]


def search(judge: Judge, *, least: float, settled: set[Question]) -> Iterator[dict[str, Any]]:
    """An entry for each question that a call asks: the rule's answer, the best one, and what it gains.

    `settled` holds questions that were answered before, for other calls or models; new ones are added.
    """
    choices: dict[str, Any] = {}
    first = best = judge.cost(choices)
    done: set[Question] = set()
    while new := [question for question in best.answers if question not in done | settled]:
        chip, question = new[0]
        done.add(new[0])
        before, rule = best, best.answers[new[0]]
        if not _is_number(rule):
            continue
        current, seen = rule, {_key(rule)}
        improved = True
        while improved:
            improved = False
            for value in neighbours(current):
                if _key(value) in seen or len(seen) > MOST_TRIES:
                    continue
                seen.add(_key(value))
                try:
                    judged = judge.cost(choices | {question: value})
                except RefusedError:
                    continue
                if gain(best, judged) > least:
                    best, current, improved = judged, value, True
                    choices[question] = value
                    break
        yield {
            "chip": chip,
            "model": judge.model,
            "question": question,
            "rule": rule,
            "choice": current,
            "gain": round(gain(before, best), 3),
            "tried": len(seen),
            "by": judge.by,
            "versions": judge.versions,
        }
    settled |= done
    if choices:
        assert gain(first, best) > 0


def gain(before: Judged, after: Judged) -> float:
    """How much faster, as a geometric mean over what both know: 0.03 is 3 %."""
    logs = [math.log(before.costs[name] / after.costs[name]) for name in before.costs]
    return math.exp(sum(logs) / len(logs)) - 1


def neighbours(value: Any) -> list[Any]:
    """Of a number: half and twice as much, or one less and one more of a small one. Of a tuple: those of each number."""
    if isinstance(value, tuple):
        places = [(i, one) for i, part in enumerate(value) for one in neighbours(part)]
        return [_replaced(value, i, one) for i, one in places]
    if not _is_number(value):
        return []
    return [one for one in ((value - 1, value + 1) if value < 8 else (value // 2, value * 2)) if one >= 1]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ("chip", "model", "call", "question", "rule", "choice", "gain", "tried", "by")
    rows = [head, ("---",) * 6 + ("--:",) * 2 + ("---",)]
    rows += [
        (*(entry[name] for name in head[:6]), f"{entry['gain']:.1%}", entry["tried"], entry["by"]) for entry in found
    ]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _is_number(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(part, int) and not isinstance(part, bool) for part in parts)


def _replaced(value: tuple[Any, ...], place: int, part: Any) -> tuple[Any, ...]:
    return (*value[:place], part, *value[place + 1 :])


def _key(value: Any) -> Any:
    return tuple(value) if isinstance(value, tuple) else value
