"""What is asked of servers, simulated or real: calls with lengths instead of texts, and the order that programs impose on
them."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxserve.errors import ConfigError

END = 0  # the end token; no prompt holds it


class Span(NamedTuple):
    """So many tokens, the same in every call that names the same `token`: what prefix caches see of a text."""

    token: int  # at least 1
    length: int


class After(NamedTuple):
    """All that an earlier call of the program read and wrote: its prompt, then its answer."""

    call_id: str


class Said(NamedTuple):
    """Only the answer of an earlier call."""

    call_id: str


Piece = Span | After | Said


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request. It arrives at `arrival_s`, or `think_s` after the last of its parents has ended if that is later.

    The scheduler does not know `output_tokens`: the answer ends with an end token that comes when it comes.
    `max_tokens` is the limit that it does know, if there is one.
    """

    call_id: str
    prompt: tuple[Piece, ...]
    output_tokens: int
    max_tokens: int | None = None
    arrival_s: float = 0.0  # from the start of the workload
    think_s: float = 0.0  # a tool runs, or a person reads
    parents: tuple[str, ...] = ()
    client: str = ""
    program: str = ""
    stage: str = ""
    priority: float = 0
    deadline_s: float | None = None  # seconds from the program's first arrival to its answer
    namespace: str = ""

    @property
    def root(self) -> str:
        """The program, or the call itself if it is none of one."""
        return f"program {self.program}" if self.program else f"call {self.call_id}"

    @property
    def wanted(self) -> set[str]:
        """Calls whose tokens the prompt is made of."""
        return {piece.call_id for piece in self.prompt if not isinstance(piece, Span)}


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """Calls in order of arrival, those of one time in the order of the list."""

    name: str
    calls: tuple[Call, ...]

    def at_rate(self, per_s: float) -> "Workload":
        """The same calls, arriving faster or slower, so that so many programs come per second on average (calls without
        parents, those of one program once). Think times stay.

        Raises:
          ConfigError: all come at once, so there is no rate that could be changed.
        """
        first = dict[str, float]()
        for call in self.calls:
            if not call.parents:
                first.setdefault(call.root, call.arrival_s)
        span_s = max(first.values(), default=0.0) - min(first.values(), default=0.0)
        if not span_s:
            raise ConfigError(f"all of {self.name} arrives at once, so it has no rate", remedy="Leave the rate out")
        factor = (len(first) - 1) / span_s / per_s
        calls = tuple(dataclasses.replace(call, arrival_s=call.arrival_s * factor) for call in self.calls)
        return Workload(self.name, calls)

    def first(self, count: int) -> "Workload":
        """The first `count` programs to arrive, with all calls that need no others."""
        roots = dict.fromkeys(call.root for call in self.calls if not call.parents)
        programs = set(itertools.islice(roots, count))
        kept = {call.call_id for call in self.calls if not call.parents and call.root in programs}
        for call in in_order(self.calls):
            if call.parents and kept.issuperset(call.parents):
                kept.add(call.call_id)
        return Workload(self.name, tuple(call for call in self.calls if call.call_id in kept))


def make_workload(name: str, calls: Iterable[Call], where: Callable[[str], str] = "call {!r}".format) -> Workload:
    """Order calls and check what ties them together. `where` says how to name a call in a message.

    Raises:
      ConfigError: no calls, an id twice, a parent that does not exist, parents in a circle, or a prompt made of calls
      that
        need not have ended.
    """
    calls = tuple(calls)
    if not calls:
        raise ConfigError(f"{name} has no calls")
    by_id = dict[str, Call]()
    for call in calls:
        if call.call_id in by_id:
            raise ConfigError(f"{where(call.call_id)}: the id {call.call_id!r} is in use already")
        by_id[call.call_id] = call
    for call in calls:
        for parent in call.parents:
            if parent not in by_id:
                raise ConfigError(
                    f"{where(call.call_id)}: there is no call {parent!r}, which is said to come before it"
                )
    _check_circles(calls, by_id, where)
    for call in calls:
        for other in call.wanted.difference(call.parents):
            if other not in _ancestors(call, by_id):
                raise ConfigError(f"{where(call.call_id)}: the prompt needs {other!r}, which does not come before it")
    return Workload(name, tuple(sorted(calls, key=lambda call: call.arrival_s)))


def critical_tokens(calls: Iterable[Call], written: Mapping[str, int]) -> int:
    """Answer tokens on the longest way through a program: what one after the other has to be written."""
    longest = dict[str, int]()
    for call in in_order(tuple(calls)):
        longest[call.call_id] = written[call.call_id] + max((longest.get(p, 0) for p in call.parents), default=0)
    return max(longest.values(), default=0)


def in_order(calls: Sequence[Call]) -> list[Call]:
    """Parents before children. Calls in a circle, and those that wait for them, are missing."""
    left = {call.call_id: len(set(call.parents)) for call in calls}
    children = dict[str, list[Call]]()
    for call in calls:
        for parent in set(call.parents):
            children.setdefault(parent, []).append(call)
            if parent not in left:  # of another part of the program
                left[call.call_id] -= 1
    ready = [call for call in calls if not left[call.call_id]]
    for call in ready:
        for child in children.get(call.call_id, ()):
            left[child.call_id] -= 1
            if not left[child.call_id]:
                ready.append(child)
    return ready


def _check_circles(calls: Sequence[Call], by_id: dict[str, Call], where: Callable[[str], str]) -> None:
    order = in_order(calls)
    if len(order) < len(calls):
        good = {call.call_id for call in order}
        circle = _circle(next(call for call in calls if call.call_id not in good), by_id, good)
        raise ConfigError(f"{where(circle[0])}: calls wait for each other in a circle: {' -> '.join(circle)}")


def _ancestors(call: Call, by_id: dict[str, Call]) -> set[str]:
    found, left = set[str](), list(call.parents)
    while left:
        parent = left.pop()
        if parent not in found:
            found.add(parent)
            left.extend(by_id[parent].parents)
    return found


def _circle(call: Call, by_id: dict[str, Call], good: set[str]) -> list[str]:
    path = [call.call_id]
    while True:
        parent = next(p for p in by_id[path[-1]].parents if p not in good)
        if parent in path:
            return [*path[path.index(parent) :], parent]
        path.append(parent)
