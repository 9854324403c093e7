"""Lines of an OpenAI batch file, not yet understood: what each is known by, and its JSON."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from jaxserve.openai.errors import ApiError

Key = str | int  # custom_id, or the number of a line that has none of its own
Line = tuple[int, Key, dict[str, Any] | ApiError]  # number, what it is known by, content or what is wrong with it

# Faults of lines that have no custom_id of their own: such a line is known by its number in the input.
NAMELESS = ("invalid_json", "missing_custom_id", "duplicate_custom_id", "line_too_long")
_PIECE = 1 << 20  # bytes, of a line that is passed over


def read_lines(file: BinaryIO, most_bytes: int | None = None) -> Iterator[Line]:
    """The lines that are not blank. A second one with the same custom_id is an error, and so is one above `most_bytes`."""
    seen: set[str] = set()
    for number, raw_bytes in enumerate(_raw_lines(file, most_bytes), start=1):
        if raw_bytes is not None and not raw_bytes.strip():
            continue
        try:
            if raw_bytes is None:
                raise ApiError(f"the line is longer than {most_bytes} bytes", code="line_too_long", status=413)
            custom_id, raw = parse_line(_decode(raw_bytes))
            if custom_id in seen:
                raise ApiError(f"custom_id {custom_id[:100]!r} was used before", code="duplicate_custom_id")
            seen.add(custom_id)
            yield number, custom_id, raw
        except ApiError as error:
            yield number, number, error


def _raw_lines(file: BinaryIO, most_bytes: int | None) -> Iterator[bytes | None]:
    """None for one that is too long; no more than `most_bytes` and a piece of it are in memory."""
    if most_bytes is None:
        yield from file
        return
    while raw := file.readline(most_bytes + 1):
        if len(raw) <= most_bytes or raw.endswith(b"\n"):
            yield raw
            continue
        while (rest := file.readline(_PIECE)) and not rest.endswith(b"\n"):
            pass
        yield None


def parse_line(line: str) -> tuple[str, dict[str, Any]]:
    """(custom_id, the whole object) of a line; everything else is `parse_job`'s.

    Raises:
      ApiError: it is no JSON object, or has no custom_id.
    """
    try:
        raw = json.loads(line)
        if "\\ud" in line or "\\uD" in line:  # nothing else can make it
            json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError("holds half of a surrogate pair, which is not text", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise ApiError(f"not JSON: {error.msg} at character {error.pos}", code="invalid_json") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise ApiError(f"JSON that cannot be read: {error}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise ApiError(f"a line must be a JSON object, not {kind(raw)}", code="invalid_json")
    custom_id = raw.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise ApiError("custom_id is missing or is not a text", code="missing_custom_id", param="custom_id")
    return custom_id, raw


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ApiError(f"not UTF-8 at byte {error.start}", code="invalid_json") from None


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "nothing")
