"""Workloads from files. The form is told by the first line:

Azure (LLM inference trace 2023), CSV with these columns; answers of 0 tokens are counted as 1:

    TIMESTAMP,ContextTokens,GeneratedTokens
    2023-11-16 18:15:46.6805900,374,44

Mooncake (FAST 2025, arXiv 2407.00079), one JSON object a line. Times are milliseconds; each id stands for 512 tokens of
the prompt, the same wherever it occurs; the last one for what is left:

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, ...]}

Ours, one JSON object a line; only `prompt` and `output_tokens` must be there. The prompt is a number of tokens that no
other call has, or a list of pieces: such a number; `["handbook", 3000]`, tokens that all calls share that name them;
`{"after": "a"}`, all that call "a" read and wrote; `{"said": "a"}`, only its answer.

    {"id": "b", "arrival_s": 1.5, "prompt": [{"after": "a"}, 40], "output_tokens": 200, "parents": ["a"], "think_s": 2.0,
     "program": "chat-1", "client": "alice", "stage": "turn 2", "priority": 0, "deadline_s": 30.0, "max_tokens": 512}
"""

import csv
import datetime
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

from jaxserve.config import reject_unknown
from jaxserve.errors import ConfigError
from jaxserve.workload.call import After, Call, Piece, Said, Span, Workload, make_workload

BLOCK_TOKENS = 512  # of a Mooncake id
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE = ("timestamp", "input_length", "output_length", "hash_ids")
_OURS = (
    "id",
    "prompt",
    "output_tokens",
    "arrival_s",
    "max_tokens",
    "parents",
    "think_s",
    "client",
    "program",
    "stage",
    "priority",
    "deadline_s",
    "namespace",
)
_MOST_LINES = 5_000_000
_MOST_CHARACTERS = 4_000_000  # of a line
_MOST_TOKENS = 100_000_000  # of a prompt or an answer
_LAST_S = 1e10
_PLAIN = Call(call_id="", prompt=(), output_tokens=1)


def read_trace(path: Path) -> Workload:
    """The calls of a trace file.

    Raises:
      ConfigError: it is no trace, or a line of it is wrong; the line is named.
      OSError: it cannot be read.
    """
    with path.open("rb") as raw:
        if raw.read(2) == b"\x1f\x8b":
            raise ConfigError(f"{path} is compressed", remedy=f"Unpack it first: gunzip -k {path.name}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = _lines(path, file)
        try:
            number, first = next(lines)
        except StopIteration:
            raise ConfigError(f"{path} is empty, so there are no calls in it") from None
        if first.lstrip().startswith("{"):
            calls, places = _read_json(path, first, number, lines)
        else:
            calls, places = _read_azure(path, first, lines)

    def where(call_id: str) -> str:
        return f"{path}, line {places[call_id]}"

    return make_workload(path.name, calls, where)


def save_trace(workload: Workload, path: Path) -> None:
    """Write a workload in our own form; read again, it is the same but for its name."""
    uses = dict[int, int]()
    for call in workload.calls:
        for piece in call.prompt:
            if isinstance(piece, Span):
                uses[piece.token] = uses.get(piece.token, 0) + 1
    with path.open("w", encoding="utf-8") as file:
        for call in workload.calls:
            fields = {"id": call.call_id, "prompt": [_piece_json(piece, uses) for piece in call.prompt]}
            fields["output_tokens"] = call.output_tokens
            fields |= {name: value for name in _OURS[3:] if (value := getattr(call, name)) != getattr(_PLAIN, name)}
            file.write(json.dumps(fields) + "\n")


def _piece_json(piece: Piece, uses: Mapping[int, int]) -> Any:
    if isinstance(piece, Span):
        return piece.length if uses[piece.token] == 1 else [f"s{piece.token}", piece.length]
    return {"after" if isinstance(piece, After) else "said": piece.call_id}


def _lines(path: Path, file: TextIO) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers."""
    number = 0
    while True:
        try:
            line = file.readline(_MOST_CHARACTERS + 1)
        except UnicodeDecodeError:
            _refuse(path, number + 1, "is not text in UTF-8")
        if not line:
            return
        number += 1
        if len(line) > _MOST_CHARACTERS:
            _refuse(path, number, f"has more than {_MOST_CHARACTERS:,} characters")
        if number > _MOST_LINES:
            raise ConfigError(f"{path} has more than {_MOST_LINES:,} lines", remedy="Cut it")
        if line.strip():
            yield number, line


def _refuse(path: Path, number: int, why: str) -> NoReturn:
    raise ConfigError(f"{path}, line {number}: {why}") from None


def _read_azure(path: Path, first: str, lines: Iterator[tuple[int, str]]) -> tuple[list[Call], dict[str, int]]:
    header = tuple(next(csv.reader([first])))
    if set(AZURE) - set(header):
        raise ConfigError(
            f"{path} is no trace: its first line is {first.strip()[:60]!r}",
            remedy=f"Give JSON lines, or a CSV file with the columns {', '.join(AZURE)}",
        )
    places, calls = dict[str, int](), list[Call]()
    start: datetime.datetime | None = None
    for number, line in lines:
        fields = dict(zip(header, next(csv.reader([line])), strict=False))
        if len(fields) < len(header):
            _refuse(path, number, f"{len(fields)} columns instead of {len(header)}")
        try:
            time = datetime.datetime.fromisoformat(fields["TIMESTAMP"])
            start = start or time
            arrival_s = (time - start).total_seconds()
        except (ValueError, TypeError):  # no date; or with a time zone where others have none
            _refuse(path, number, f"TIMESTAMP={fields['TIMESTAMP'][:40]!r} is no date and time")
        counts = [
            _count(path, number, name, _digits(fields[name]), least) for name, least in ((AZURE[1], 1), (AZURE[2], 0))
        ]
        places[str(number)] = number
        calls.append(
            Call(
                call_id=str(number),
                prompt=(Span(number, counts[0]),),
                output_tokens=max(counts[1], 1),
                arrival_s=arrival_s,
            )
        )
    return _from_zero(calls), places


def _digits(text: str) -> Any:
    return int(text) if text.strip().isascii() and text.strip().isdigit() and len(text) < 20 else text


def _from_zero(calls: list[Call]) -> list[Call]:
    """Clocks that began long before the first call, or after it."""
    first_s = min((call.arrival_s for call in calls), default=0.0)
    for call in calls if first_s else ():
        object.__setattr__(call, "arrival_s", call.arrival_s - first_s)  # nobody has seen them yet
    return calls


def _read_json(
    path: Path, first: str, first_number: int, lines: Iterator[tuple[int, str]]
) -> tuple[list[Call], dict[str, int]]:
    places, calls = dict[str, int](), list[Call]()
    read = _mooncake_call if set(MOONCAKE) <= set(_object(path, first_number, first)) else _Reader(path).call
    for number, line in _chain((first_number, first), lines):
        call = read(path, number, _object(path, number, line))
        if call.call_id in places:
            _refuse(path, number, f"the id {call.call_id!r} is that of line {places[call.call_id]}")
        places[call.call_id] = number
        calls.append(call)
    return calls, places


def _chain(first: tuple[int, str], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield first
    yield from rest


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        _refuse(path, number, f"is not JSON ({error if isinstance(error, json.JSONDecodeError) else 'absurd values'})")
    if not isinstance(value, dict):
        _refuse(path, number, "is no JSON object")
    return value


def _mooncake_call(path: Path, number: int, raw: dict[str, Any]) -> Call:
    for name in MOONCAKE:
        if name not in raw:
            _refuse(path, number, f"{name} is missing")
    arrival_s = _number(path, number, "timestamp", raw["timestamp"]) / 1000
    length = _count(path, number, "input_length", raw["input_length"])
    ids = raw["hash_ids"]
    if not isinstance(ids, list) or not all(isinstance(each, int) and 0 <= each < 1 << 62 for each in ids):
        _refuse(path, number, "hash_ids must be a list of whole numbers, 0 or more")
    if len(ids) != -(-length // BLOCK_TOKENS):
        _refuse(path, number, f"{len(ids)} hash_ids for {length} tokens; one stands for {BLOCK_TOKENS}")
    counts = [BLOCK_TOKENS] * (len(ids) - 1) + [length - BLOCK_TOKENS * (len(ids) - 1)]
    return Call(
        call_id=str(number),
        prompt=tuple(Span(each + 1, count) for each, count in zip(ids, counts, strict=True)),
        output_tokens=_count(path, number, "output_length", raw["output_length"]),
        arrival_s=arrival_s,
    )


class _Reader:
    """Our own form. Names of shared tokens become numbers as they are met."""

    def __init__(self, path: Path):
        self._path = path
        self._names: dict[str, int] = {}
        self._next = 1

    def call(self, path: Path, number: int, raw: dict[str, Any]) -> Call:
        try:
            reject_unknown(raw, _OURS, what="key")
        except ConfigError as error:
            _refuse(path, number, str(error))
        for name in ("prompt", "output_tokens"):
            if name not in raw:
                _refuse(path, number, f"{name} is missing")
        parents = raw.get("parents", [])
        if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
            _refuse(path, number, "parents must be a list of ids")
        max_tokens, deadline_s = raw.get("max_tokens"), raw.get("deadline_s")
        return Call(
            call_id=_text(path, number, "id", raw.get("id", str(number))),
            prompt=self._prompt(number, raw["prompt"]),
            output_tokens=_count(path, number, "output_tokens", raw["output_tokens"]),
            max_tokens=None if max_tokens is None else _count(path, number, "max_tokens", max_tokens),
            deadline_s=None if deadline_s is None else _number(path, number, "deadline_s", deadline_s),
            priority=_number(path, number, "priority", raw.get("priority", 0), -_LAST_S),
            parents=tuple(parents),
            arrival_s=_number(path, number, "arrival_s", raw.get("arrival_s", 0)),
            think_s=_number(path, number, "think_s", raw.get("think_s", 0)),
            client=_text(path, number, "client", raw.get("client", "")),
            program=_text(path, number, "program", raw.get("program", "")),
            stage=_text(path, number, "stage", raw.get("stage", "")),
            namespace=_text(path, number, "namespace", raw.get("namespace", "")),
        )

    def _prompt(self, number: int, raw: Any) -> tuple[Piece, ...]:
        pieces = tuple(self._piece(number, piece) for piece in (raw if isinstance(raw, list) else [raw]))
        if not pieces:
            _refuse(self._path, number, "the prompt is empty")
        return pieces

    def _piece(self, number: int, raw: Any) -> Piece:
        match raw:
            case [str(name), count]:
                if name not in self._names:
                    self._names[name] = self._new()
                return Span(self._names[name], _count(self._path, number, f"prompt: {name}", count))
            case {"after": str(call_id), **rest} if not rest:
                return After(call_id)
            case {"said": str(call_id), **rest} if not rest:
                return Said(call_id)
            case int():
                return Span(self._new(), _count(self._path, number, "prompt", raw))
        shown = json.dumps(raw)[:60]
        _refuse(
            self._path,
            number,
            f'{shown} is no piece of a prompt; write 50, ["name", 50], {{"after": "id"}} or {{"said": "id"}}',
        )

    def _new(self) -> int:
        self._next += 1
        return self._next - 1


def _text(path: Path, number: int, name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        _refuse(path, number, f"{name}={value!r:.60} must be a text of at most 1,000 characters")
    return value


def _count(path: Path, number: int, name: str, value: Any, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST_TOKENS:
        _refuse(path, number, f"{name}={value!r:.40} must be a whole number from {least} to {_MOST_TOKENS:,}")
    return value


def _number(path: Path, number: int, name: str, value: Any, least: float = 0.0) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not least <= value <= _LAST_S * 1000:
        _refuse(path, number, f"{name}={value!r:.40} must be a number" + (" and not negative" if not least else ""))
    return float(value)
