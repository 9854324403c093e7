"""A folder that one server has for itself, and writing in it so that no death of the process leaves half a file."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from jaxserve.errors import UnavailableError

UNFINISHED = ".part"  # ends the names of files that are being written


def claim(folder: Path) -> BinaryIO:
    """Make the folder, and take it until the returned file is closed or the process dies.

    Raises:
      UnavailableError: another server has it, or it cannot be written in.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / "lock").open("a+b")
    except OSError as error:
        raise UnavailableError(
            f"the folder of files {folder} cannot be used: {(error.strerror or str(error)).lower()}",
            remedy="Give --files-dir one that may be written in",
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read(40).decode(errors="replace").strip()
        lock.close()
        raise UnavailableError(
            f"another server (process {owner}) has the folder of files {folder}",
            remedy="Give this one a --files-dir of its own, or stop the other",
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()).encode())
    lock.flush()
    return lock


def write_json(path: Path, content: Any) -> None:
    """Replace a file as a whole: whoever reads it finds the old content or the new."""
    part = path.with_name(path.name + UNFINISHED)
    with part.open("wb") as file:
        file.write(json.dumps(content).encode())
        publish(file, part, path)


def publish(file: BinaryIO, part: Path, path: Path) -> None:
    """What was written to `part` is there as `path` from now on, even after a loss of power."""
    file.flush()
    os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Names that have come or gone in a folder stay so after a loss of power."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
