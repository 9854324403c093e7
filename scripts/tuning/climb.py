"""The search: from what the rule says to something better at some lengths and worse at none, one number at a time."""

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


def search(judge: Judge, *, least: float, known: dict[Question, Any]) -> Iterator[dict[str, Any]]:
    """An entry for each question that a call asks: the rule's answer, the best one, and what it gains.

    `known` holds what was found before, for other calls or models: a better answer, or None where the rule stays. Those
    questions are not tried again; new ones are added, unless no answer makes a difference to this call.
    """
    best = judge.cost({})
    if not best.answers:
        return
    chip = next(iter(best.answers))[0]
    choices = {question: better for (where, question), better in known.items() if where == chip and better is not None}
    if choices:
        best = judge.cost(choices)
    idle: set[str] = set()
    while new := [
        question for place, question in best.answers if (place, question) not in known and question not in idle
    ]:
        question, before, matters = new[0], best, False
        rule = best.answers[chip, question]
        current, seen = rule, {rule}
        while value := next((one for one in neighbours(current, by_one=judge.by == "timing") if one not in seen), None):
            if len(seen) > MOST_TRIES:
                break
            seen.add(value)
            try:
                judged = judge.cost(choices | {question: value})
            except RefusedError:
                continue
            matters |= judged.costs != before.costs
            if not matters:
                break  # the same to the last digit: another kernel's question
            if gain(best, judged) >= least and worst(best, judged) >= -least:
                best, current, choices[question] = judged, value, value
        if not matters:
            idle.add(question)
            continue
        known[chip, question] = choices.get(question)
        yield {
            "chip": chip,
            "model": judge.model,
            "question": question,
            "rule": rule,
            "choice": current,
            "gain": round(gain(before, best), 3),
            "speedups": {name: round(cost / best.costs[name], 3) for name, cost in before.costs.items()},
            "tried": len(seen),
            "by": judge.by,
            "versions": judge.versions,
        }


def gain(before: Judged, after: Judged) -> float:
    """How much faster, as a geometric mean over what both know: 0.03 is 3 %."""
    logs = [math.log(before.costs[name] / after.costs[name]) for name in before.costs]
    return math.exp(sum(logs) / len(logs)) - 1


def worst(before: Judged, after: Judged) -> float:
    """The least gain of all; negative for a loss."""
    return min(before.costs[name] / after.costs[name] for name in before.costs) - 1


def neighbours(value: Any, *, by_one: bool) -> list[Any]:
    """Of a number: half and twice as much. Of a tuple: those of each number in it.

    `by_one`: of numbers below 8 also one less and one more. What kernels ask for are mostly powers of two, and a size that
    does not divide another may give wrong results: for use where results are looked at.
    """
    if isinstance(value, tuple):
        places = [(i, one) for i, part in enumerate(value) for one in neighbours(part, by_one=by_one)]
        return [_replaced(value, i, one) for i, one in places]
    if not _is_number(value):
        return []
    steps = (value - 1, value + 1) if by_one and value < 8 else ()
    return [one for one in (*steps, value // 2, value * 2) if one >= 1]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ("chip", "model", "call", "question", "rule", "choice", "gain", "tried", "by")
    rows = [head, ("---",) * 6 + ("--:",) * 2 + ("---",)]
    rows += [
        (*(entry[name] for name in head[:6]), f"{entry['gain']:.1%}", entry["tried"], entry["by"]) for entry in found
    ]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _replaced(value: tuple[Any, ...], place: int, part: Any) -> tuple[Any, ...]:
    return (*value[:place], part, *value[place + 1 :])
