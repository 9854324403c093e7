"""Work done by child processes, item by item: one that dies or hangs costs an item, and another goes on with the rest.

A child gets the items as a JSON list on its standard input. For each it writes its results to standard output, one JSON
object per line, and then `{"done": ITEM}`; lines that are no such objects are passed on to the user.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

MOST_DEATHS = 8  # then a section is given up
STATES = ("passed", "refused", "failed", "measured", "skipped")


class Result(NamedTuple):
    """What came of an item, or of one part of it."""

    item: str
    name: str  # backend or engine
    state: str  # one of STATES
    text: str  # why, if it was refused, failed or skipped; or what there is to say
    numbers: dict[str, Any]


def answer(run: Callable[[str], Iterable[Result]]) -> int:
    """The child: `run` each item of standard input. Ends after an error of the device, which may have lost its state."""
    for item in json.load(sys.stdin):
        lost = False
        try:
            for result in run(item):
                print(json.dumps(result._asdict()), flush=True)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with an item, the others are still to be done
            lost = "RuntimeError" in type(error).__name__  # JAX's own and torch's
            print(json.dumps(failure(item, said(error))._asdict()), flush=True)
        print(json.dumps({"done": item}), flush=True)
        if lost:
            return 3
    return 0


def ask(
    command: Sequence[str], items: Sequence[str], timeout_s: float, environment: dict[str, str]
) -> Iterator[Result]:
    """The parent: results as they come; `timeout_s` is the longest silence of a child."""
    todo, deaths = list(items), 0
    while todo:
        reason = ""
        for line in _lines(command, todo, timeout_s, environment):
            if isinstance(line, str):
                reason = line
            elif "done" in line:
                todo.remove(line["done"])
            else:
                yield Result(**line)
        if todo and reason:
            yield failure(todo.pop(0), reason)
            deaths += 1
        if deaths == MOST_DEATHS:
            for item in todo:
                yield failure(item, f"not run after {deaths} dead processes")
            return


def failure(item: str, text: str) -> Result:
    """Of a whole item; what follows a bar is the name of the backend."""
    what, _, name = item.partition(" | ")
    return Result(what, name, "failed", text, {})


def said(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, ExceptionGroup):
        lines = ["; ".join(said(one) for one in error.exceptions)]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _lines(
    command: Sequence[str], items: Sequence[str], timeout_s: float, environment: dict[str, str]
) -> Iterator[dict[str, Any] | str]:
    """Objects that a child writes, then why it ended if that was not by itself."""
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        process_group=0,
    )
    assert child.stdin is not None and child.stdout is not None
    written: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in child.stdout or ():
            written.put(line)
        written.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # it may be dead already
            child.stdin.write(json.dumps(items))
            child.stdin.close()
        while (line := written.get(timeout=timeout_s)) is not None:
            if line.startswith('{"'):
                yield json.loads(line)
            else:
                print(line, end="", file=sys.stderr)
        code = child.wait()
        if code not in (0, 3):
            yield (
                f"the process died with {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"
            )
    except queue.Empty:
        yield f"no answer within {timeout_s:.0f} s"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        reader.join()
        child.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
