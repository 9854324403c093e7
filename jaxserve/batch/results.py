"""The output file of a batch: append-only JSON lines that survive `kill -9` without a lost or doubled answer.

A line is written whole, newline last, in one write. What a killed run leaves is therefore whole lines and at most one
torn last line, which the next run cuts off; the requests already answered are read from the file and skipped.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from jaxserve.batch.lines import NAMELESS, Key
from jaxserve.errors import RequestError
from jaxserve.openai.errors import ApiError
from jaxserve.openai.ids import new_id

LINE_START = b'{"id": "batch_req_'  # of every result line, torn or whole


def open_results(path: Path) -> tuple[BinaryIO, set[Key]]:
    """Open for appending; also says which requests are answered already.

    Raises:
      RequestError: the file is not the result of a batch, or another run is writing it.
    """
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file, drop_torn_line(file, path)
    except BlockingIOError:
        file.close()
        raise RequestError(f"another run is writing {path}", remedy="Wait for it, or give another -o") from None
    except RequestError:
        file.close()
        raise


def drop_torn_line(file: BinaryIO, path: Path) -> set[Key]:
    """Read the answered keys, and cut the file after its last whole line."""
    file.seek(0)
    answered: set[Key] = set()
    whole_bytes = 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            if not line.startswith(LINE_START[: len(line)]):  # not ours: a file given by mistake
                raise not_a_result(number, path)
            break
        answered.add(key_of(line, number, path))
        whole_bytes += len(line)
    file.truncate(whole_bytes)
    file.seek(0, os.SEEK_END)
    return answered


def key_of(line: bytes, number: int, path: Path) -> Key:
    """The request that a result line answers."""
    try:
        result = json.loads(line)
        error = result["error"] or {}
        return int(error["line"]) if error.get("code") in NAMELESS else str(result["custom_id"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise not_a_result(number, path) from None


def not_a_result(number: int, path: Path) -> RequestError:
    return RequestError(
        f"{path} line {number} is not the result of a batch, so nothing was written to it",
        remedy="Give another -o, or remove the file",
    )


def append(file: BinaryIO, result: dict[str, Any]) -> None:
    """Write one result line. After this returns the answer survives the death of this process."""
    file.write(json.dumps(result, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    file.flush()


def result_line(number: int, custom_id: str | None, answer: dict[str, Any] | ApiError) -> dict[str, Any]:
    """A line of the output file: OpenAI's fields, and in an error also the line of the input."""
    line: dict[str, Any] = {"id": new_id("batch_req_"), "custom_id": custom_id}
    request_id = new_id("req_")
    if not isinstance(answer, ApiError):
        return line | {"response": {"status_code": 200, "request_id": request_id, "body": answer}, "error": None}
    return line | {
        "response": {"status_code": answer.status, "request_id": request_id, "body": answer.body()},
        "error": {"code": code_of(answer), "message": answer.message, "line": number},
    }


def code_of(error: ApiError) -> str:
    """For programs; every line with an error has one."""
    return error.code or ("internal_error" if error.status >= 500 else "invalid_request")
