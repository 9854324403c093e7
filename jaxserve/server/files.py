"""Files that clients have uploaded, and the results of their batches: a content and a description of each in one folder.

Names in the folder are ids that we have made. What a client calls a file is only told back, and the id that a client asks
for is looked up among those that there are: neither ever becomes part of a path.
"""

import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from jaxserve.openai.errors import ApiError
from jaxserve.openai.ids import new_id
from jaxserve.server.folder import UNFINISHED, publish, sync, write_json

PREFIX = "file-"
BATCH, BATCH_OUTPUT = "batch", "batch_output"  # purposes
_OURS = re.compile(rf"(?P<id>file-[0-9a-f]{{32}})\.(data|json)(?P<part>{re.escape(UNFINISHED)})?")
_PIECE = 1 << 20  # bytes that are in memory at a time
_MOST_FILES = 10_000  # of a client


@dataclasses.dataclass(frozen=True, slots=True)
class StoredFile:
    """What is known of a file. Times are seconds since 1970."""

    file_id: str
    client: str  # whose it is; empty without keys
    filename: str
    purpose: str
    num_bytes: int
    created_s: float
    expires_s: float

    def body(self) -> dict[str, Any]:
        """OpenAI's `file`."""
        return {
            "id": self.file_id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": int(self.created_s),
            "expires_at": int(self.expires_s),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class FileStore:
    """All of them. Its methods may take the time that a disk takes; any thread may call them."""

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        max_client_bytes: int,
        ttl_s: float,
        clock: Callable[[], float] = time.time,
    ):
        """`folder` is ours alone. `max_bytes` of one file, `max_client_bytes` of all files of a client."""
        self.max_bytes = max_bytes
        self._max_client_bytes = max_client_bytes
        self._ttl_s = ttl_s
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()  # of the index, never held while the disk works
        self._adding = threading.Lock()  # so that two files cannot take the same room
        folder.mkdir(exist_ok=True)
        self._files = {file.file_id: file for file in sorted(self._read(), key=lambda file: file.created_s)}
        for path in folder.iterdir():  # what a killed server has left; nothing else is touched
            found = _OURS.fullmatch(path.name)
            if found and (found["part"] or found["id"] not in self._files):
                path.unlink()

    def _read(self) -> list[StoredFile]:
        found = list[StoredFile]()
        for path in self._folder.glob("*.json"):
            if _OURS.fullmatch(path.name):
                file = StoredFile(**json.loads(path.read_bytes()))
                if file.file_id == path.stem and self.path(file).exists():
                    found.append(file)
        return found

    def add(
        self,
        source: BinaryIO,
        *,
        client: str,
        filename: str,
        purpose: str,
        ttl_s: float | None = None,
        file_id: str | None = None,
    ) -> StoredFile:
        """Keep a copy. With the `file_id` of one that is there already, instead of it.

        Raises:
          ApiError: it is too long, or the client has too much.
        """
        file_id = file_id or new_id(PREFIX)
        target = self._folder / f"{file_id}.data"
        part = target.with_name(target.name + UNFINISHED)
        now_s = self._clock()
        try:
            with part.open("wb") as file:
                num_bytes = self._copy(source, file, purpose)
                lifetime_s = self._ttl_s if ttl_s is None else min(ttl_s, self._ttl_s)
                known = StoredFile(file_id, client, plain(filename), purpose, num_bytes, now_s, now_s + lifetime_s)
                with self._adding:
                    if purpose != BATCH_OUTPUT:  # results are never lost for want of room
                        self._check_room(client, num_bytes)
                    publish(file, part, target)
                    write_json(self._folder / f"{file_id}.json", dataclasses.asdict(known))
                    with self._lock:
                        self._files[file_id] = known
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return known

    def get(self, client: str, file_id: str) -> StoredFile:
        """A file of this client.

        Raises:
          ApiError: 404; that it is another's is not told.
        """
        with self._lock:
            file = self._files.get(file_id)
        if file is None or file.client != client or file.expires_s <= self._clock():
            raise not_there(file_id)
        return file

    def of(self, client: str, purpose: str | None = None) -> list[StoredFile]:
        """All files of a client, oldest first."""
        now_s = self._clock()
        with self._lock:
            files = list(self._files.values())
        return [
            file
            for file in files
            if file.client == client and file.expires_s > now_s and purpose in (None, file.purpose)
        ]

    def delete(self, client: str, file_id: str) -> None:
        """Forget a file. Whoever reads it at the moment reads on.

        Raises:
          ApiError: as `get`.
        """
        self._remove(self.get(client, file_id))

    def sweep(self) -> None:
        """Remove files that have expired."""
        now_s = self._clock()
        with self._lock:
            expired = [file for file in self._files.values() if file.expires_s <= now_s]
        for file in expired:
            self._remove(file)

    def path(self, file: StoredFile) -> Path:
        """Where the content is."""
        return self._folder / f"{file.file_id}.data"

    def _copy(self, source: BinaryIO, target: BinaryIO, purpose: str) -> int:
        num_bytes = 0
        while piece := source.read(_PIECE):
            num_bytes += len(piece)
            if num_bytes > self.max_bytes and purpose != BATCH_OUTPUT:
                raise too_long(self.max_bytes)
            target.write(piece)
        return num_bytes

    def _check_room(self, client: str, num_bytes: int) -> None:
        with self._lock:
            own = [file for file in self._files.values() if file.client == client]
        used = sum(file.num_bytes for file in own)
        if used + num_bytes > self._max_client_bytes:
            raise ApiError(
                f"{num_bytes} bytes more would be above the {self._max_client_bytes} that a client may keep, of which "
                f"{used} are used; delete files",
                status=413,
                code="quota_exceeded",
                param="file",
            )
        if len(own) >= _MOST_FILES:
            raise ApiError(f"there are {len(own)} files already; delete some", status=413, code="quota_exceeded")

    def _remove(self, file: StoredFile) -> None:
        with self._lock:
            self._files.pop(file.file_id, None)
        # The description first: what has none is removed at the next start.
        (self._folder / f"{file.file_id}.json").unlink(missing_ok=True)
        self.path(file).unlink(missing_ok=True)
        sync(self._folder)


def plain(filename: str) -> str:
    """The last part of a name, without what a terminal or a header would obey."""
    name = PurePosixPath(filename.replace("\\", "/")).name
    return "".join(c for c in name if c.isprintable())[:255] or "file"


def not_there(file_id: str) -> ApiError:
    """What is told of a file that there is not, or not any more."""
    return ApiError(f"there is no file {file_id[:60]!r}", status=404, code="file_not_found", param="file_id")


def too_long(max_bytes: int) -> ApiError:
    """What is told of a file above the limit."""
    return ApiError(
        f"the file is longer than {max_bytes} bytes (--max-file-bytes); split it",
        status=413,
        code="file_too_long",
        param="file",
    )
