"""The collectives of a compiled program, read from its text: what devices send each other, how often, and under what.

Reads what `jax.stages.Compiled.as_text()` prints for CPU, GPU and TPU. Knows the three ways in which XLA writes an
asynchronous collective: `all-gather-start` and `-done`; `async-start` of a computation that holds it; and, on TPU, fusions
named `async-collective-start` and `-done`, between which other fusions carry a copy of the same instruction.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_COMPUTES = ("call", "conditional", "convolution", "custom-call", "dot", "fusion", "reduce", "sort", "while")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_CALLEE = re.compile(r"\b(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_CALLEES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# What XLA adds by itself: `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`, along an axis of a mesh of these devices.
_NAMED_GROUPS = re.compile(
    r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}:]*)\}"
)
_TYPE = re.compile(r"\(|\)|([a-z]\w*)\[([\d,<=]*)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One collective instruction.

    groups: ids of the devices (partitions) that talk with each other; of a permute, pairs of sender and receiver.
    result_bytes: what one device holds afterwards.
    count: how often a call of the program runs it. Every branch of a conditional counts as if it were taken.
    in_open_loop: it is in a loop whose number of turns the text does not say (TPU never says); `count` is for one turn.
    is_async: written as a start and a done, so that other work may run in between, and not marked to wait at once (GPU).
    between: computing instructions that the schedule puts between start and done.
    op_name: the JAX scopes it comes from.
    """

    name: str
    kind: str
    groups: tuple[tuple[int, ...], ...]
    result_bytes: int
    count: int = 1
    in_open_loop: bool = False
    is_async: bool = False
    between: int = 0
    op_name: str = ""

    @property
    def group_size(self) -> int:
        """Devices that talk with each other; 2 for a permute."""
        return max(map(len, self.groups))

    @property
    def sent_bytes(self) -> int:
        """What one device sends each time, if nothing is sent twice: an all-reduce as a reduce-scatter and an all-gather.

        Raises: NotImplementedError for a ragged all-to-all, whose sizes are data.
        """
        size, result = self.group_size, self.result_bytes
        match self.kind:
            case "all-gather" | "all-to-all":
                return result * (size - 1) // size
            case "all-reduce":
                return 2 * result * (size - 1) // size
            case "reduce-scatter":
                return result * (size - 1)
            case "collective-permute" | "collective-broadcast":
                return result
            case _:
                raise NotImplementedError(f"the text does not say how much a {self.kind} sends")


def collectives(text: str) -> list[Collective]:
    """All collectives of a program, as they are reached from its entry; groups of one device included.

    Raises: ValueError for a text that is no program, or replica groups in an unknown form.
    """
    computations, entry = _parse(text)
    is_scheduled = "is_scheduled=true" in text.split("\n", 1)[0]
    found: dict[str, Collective] = {}
    for visit in _visits(computations, _Visit(computations[entry])):
        lines = visit.computation.lines
        for index, line in enumerate(lines):
            kind = line.opcode.removesuffix("-start")
            if kind not in KINDS or not _is_first(line, visit.computation):
                continue
            before = found.get(line.name)
            starts = line.opcode.endswith("-start")
            between = _computing(lines, index, _done(lines, index)) if starts else visit.between
            found[line.name] = Collective(
                name=line.name,
                kind=kind,
                groups=_groups(line.rest, text),
                result_bytes=_result_bytes(kind, line.type, starts),
                count=visit.times + (before.count if before else 0),
                in_open_loop=visit.in_open_loop,
                is_async=visit.is_async or (starts and '"is_sync":true' not in line.rest),
                between=between if is_scheduled else 0,
                op_name=_attribute(r'op_name="([^"]*)"', line.rest),
            )
    return list(found.values())


def totals(found: list[Collective]) -> dict[str, tuple[int, int]]:
    """By kind: how many run, and the bytes that one device sends in all of them. Groups of one device send nothing."""
    sums: dict[str, tuple[int, int]] = {}
    for one in found:
        if one.group_size > 1:
            count, sent = sums.get(one.kind, (0, 0))
            sums[one.kind] = (count + one.count, sent + one.count * one.sent_bytes)
    return sums


@dataclass(frozen=True, slots=True)
class _Line:
    """An instruction: `%name = type opcode(rest`."""

    name: str
    type: str
    opcode: str
    rest: str


@dataclass(frozen=True, slots=True)
class _Computation:
    name: str
    lines: list[_Line] = field(default_factory=list)

    def has(self, custom_call: str) -> bool:
        """Whether it calls one of XLA's markers."""
        return any(f'custom_call_target="{custom_call}"' in line.rest for line in self.lines)


@dataclass(frozen=True, slots=True)
class _Visit:
    """A computation as it is reached from one place; the rest as in `Collective`."""

    computation: _Computation
    times: int = 1
    in_open_loop: bool = False
    is_async: bool = False
    between: int = 0


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[2]] = _Computation(head[2])
            entry = head[2] if head[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            current.lines.append(_Line(*found.groups()))
    if not entry:
        raise ValueError(f"this is no text of a compiled program: {text[:60]!r}")
    return computations, entry


def _visits(computations: dict[str, _Computation], visit: _Visit) -> Iterator[_Visit]:
    """A computation and all that it calls, once for each place that calls it."""
    yield visit
    lines = visit.computation.lines
    for index, line in enumerate(lines):
        if line.opcode in ("async-update", "async-done") or line.opcode.removesuffix("-start") in KINDS:
            continue  # they name what async-start has run, or a reduction
        names = _CALLEE.findall(line.rest)
        for several in _CALLEES.findall(line.rest):
            names += [name.strip(" %") for name in several.split(",")]
        for called in (computations[name] for name in names if name in computations):
            inner = replace(visit, computation=called)
            if line.opcode == "while":
                trips = _TRIP_COUNT.search(line.rest)
                times = visit.times * (int(trips[1]) if trips else 1)
                inner = replace(inner, times=times, in_open_loop=visit.in_open_loop or not trips)
            elif line.opcode == "async-start":
                inner = replace(inner, is_async=True, between=_computing(lines, index, _done(lines, index)))
            elif called.has("AsyncCollectiveStart"):
                done = _fused_done(computations, lines, _chain(called))
                inner = replace(inner, is_async=True, between=_computing(lines, index, done))
            yield from _visits(computations, inner)


def _is_first(line: _Line, computation: _Computation) -> bool:
    """Not a copy of an instruction that a fusion before has started (TPU)."""
    return "async_collective_fusion_config" not in line.rest or computation.has("AsyncCollectiveStart")


def _chain(computation: _Computation) -> str:
    """What the start and the done of one fused collective have in common."""
    return next((c for line in computation.lines if (c := _attribute(r'chain_id="(\d+)"', line.rest))), "")


def _fused_done(computations: dict[str, _Computation], lines: list[_Line], chain: str) -> int:
    for index, line in enumerate(lines):
        called = computations.get(_attribute(_CALLEE.pattern, line.rest))
        if called and called.has("AsyncCollectiveDone") and _chain(called) == chain:
            return index
    return 0


def _done(lines: list[_Line], start: int) -> int:
    """The line that waits for what another started, updates in between followed; 0 if it is not there."""
    name = lines[start].name
    for index in range(start + 1, len(lines)):
        line = lines[index]
        if re.search(rf"%?{re.escape(name)}[,)]", line.rest.split(" ", 1)[0] + ")"):
            if line.opcode.endswith("-done"):
                return index
            if line.opcode.endswith("-update"):
                name = line.name
    return 0


def _computing(lines: list[_Line], start: int, done: int) -> int:
    between = lines[start + 1 : max(done, start + 1)]
    return sum(line.opcode in _COMPUTES and not line.name.startswith("async-collective") for line in between)


def _attribute(pattern: str, rest: str) -> str:
    found = re.search(pattern, rest)
    return found[1] if found else ""


def _result_bytes(kind: str, type_text: str, starts: bool) -> int:
    """Of what a collective gives; the type of a start lists its operands first, but for an all-reduce."""
    parts = _sizes(type_text)
    if starts and kind != "all-reduce":
        assert isinstance(parts, list), f"the start of a {kind} of type {type_text}"
        return _sum(parts[1])
    return _sum(parts)


def _sizes(type_text: str) -> int | list[Any]:
    """Bytes of an array, or a list of those of a tuple's parts."""
    plain = re.sub(r"/\*.*?\*/|\{[^{}]*\}", "", type_text)  # no comments, no layouts
    stack: list[list[Any]] = [[]]
    for token in _TYPE.finditer(plain):
        if token[0] == "(":
            stack.append([])
        elif token[0] == ")":
            done = stack.pop()
            stack[-1].append(done)
        else:
            dims = [int(d) for d in token[2].replace("<=", "").split(",") if d]
            stack[-1].append(math.prod(dims) * _bits(token[1]) // 8)
    return stack[0][0]


def _bits(dtype: str) -> int:
    if dtype in ("pred", "token", "opaque"):
        return 8 if dtype == "pred" else 0
    digits = re.search(r"\d+", dtype)
    if digits is None:
        raise ValueError(f"an array of unknown type {dtype!r}")
    return int(digits[0])


def _sum(sizes: int | list[Any]) -> int:
    return sizes if isinstance(sizes, int) else sum(map(_sum, sizes))


def _groups(rest: str, text: str) -> tuple[tuple[int, ...], ...]:
    listed = re.search(r"\b(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", rest)
    if listed and listed[1]:
        return tuple(tuple(int(i) for i in one.split(",") if i) for one in re.findall(r"\{([\d,]*)\}", listed[1]))
    counted = re.search(r"\breplica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if counted:
        return _iota(int(counted[2]), [int(d) for d in counted[3].split(",")], counted[4])
    if named := _NAMED_GROUPS.search(rest):
        places, dims = _along(named[1], re.findall(r"'([^']+)'", named[4])), named[2] or ""
        ids = sum(_iota(1, [int(d) for d in dims.split(",")], named[3]), ()) if dims else range(sum(map(len, places)))
        return tuple(sorted(tuple(ids[place] for place in group) for group in places))
    if listed or "replica_groups=" not in rest:
        head = text.split("\n", 1)[0]
        sizes = [int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", head)]
        return (tuple(range(math.prod(sizes))),)
    raise ValueError(f"replica groups in an unknown form: {rest[rest.index('replica_groups=') :][:80]}")


def _iota(group_size: int, dims: list[int], order_text: str | None) -> tuple[tuple[int, ...], ...]:
    """`[groups,size]<=[dims]T(order)`: all ids in the shape `dims`, transposed, and cut into groups."""
    order = [int(i) for i in order_text.split(",")] if order_text else list(range(len(dims)))
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    ids = [0]
    for axis in order:
        ids = [start + step * strides[axis] for start in ids for step in range(dims[axis])]
    return tuple(tuple(ids[i : i + group_size]) for i in range(0, len(ids), group_size))


def _along(mesh: str, axes: list[str]) -> tuple[tuple[int, ...], ...]:
    """The places in a mesh `'a'=2,'b'=4` that differ only along some axes."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    order = [i for i, name in enumerate(sizes) if name not in axes] + [list(sizes).index(name) for name in axes]
    return _iota(math.prod(sizes[name] for name in axes), list(sizes.values()), ",".join(map(str, order)))
