"""What is known of a batch, on disk: enough to go on after the server was killed at any moment.

Each batch has a folder:

    state.json      this
    input.jsonl     the requests: a second name of the uploaded file, so that deleting that does no harm
    results.jsonl   answers and errors so far, appended (jaxserve/batch/results.py); who is in there is done
"""

import dataclasses
import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from jaxserve.openai.errors import ApiError
from jaxserve.openai.ids import new_id
from jaxserve.server.folder import UNFINISHED, sync, write_json

PREFIX = "batch_"
_ID = re.compile(r"batch_[0-9a-f]{32}")
_MOST_ENDED = 10_000  # of a client; each takes some kB here and on disk
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclasses.dataclass(slots=True)
class Batch:
    """OpenAI's `batch`, whose it is, and where its results go. Times are seconds since 1970."""

    batch_id: str
    client: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: float
    expires_at: float
    meta: dict[str, Any]  # what its maker's headers said to the scheduler
    metadata: dict[str, str] | None = None
    output_ttl_s: float | None = None
    status: str = "validating"
    times: dict[str, float] = dataclasses.field(default_factory=dict)  # "in_progress_at" and so on
    errors: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # why it failed
    output_file_id: str = ""  # chosen before the file is written, so that writing can be repeated
    error_file_id: str = ""
    total: int = 0
    completed: int = 0  # as of the last change of status; while it runs they are counted in memory
    failed: int = 0
    usage: dict[str, Any] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in ENDED

    def body(self) -> dict[str, Any]:
        """As a client sees it."""
        names = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        stamps = {f"{name}_at": self.times.get(f"{name}_at") for name in names}
        return {
            "id": self.batch_id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": (self.has_ended and self.output_file_id) or None,
            "error_file_id": (self.has_ended and self.error_file_id) or None,
            "created_at": int(self.created_at),
            "expires_at": int(self.expires_at),
            **{name: None if at is None else int(at) for name, at in stamps.items()},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": self.usage,
            "metadata": self.metadata,
        }


class BatchStore:
    """All batches. Methods that write may take the time that a disk takes; any thread may call them."""

    def __init__(self, folder: Path, ttl_s: float):
        """`ttl_s`: how long what is known of a batch is kept after its end."""
        self._folder = folder
        self._ttl_s = ttl_s
        self._lock = threading.Lock()  # of the index, never held while the disk works
        self._saving = threading.Lock()
        folder.mkdir(exist_ok=True)
        self._batches: dict[str, Batch] = {}
        for path in folder.iterdir():
            if not _ID.fullmatch(path.name):
                continue  # not ours
            if (path / "state.json").exists():
                (path / f"state.json{UNFINISHED}").unlink(missing_ok=True)
                batch = Batch(**json.loads((path / "state.json").read_bytes()))
                self._batches[path.name] = batch
                if batch.has_ended:
                    self.tidy(batch)
            else:  # a killed server has left it: its maker was never told of it
                shutil.rmtree(path, ignore_errors=True)
        self._batches = dict(sorted(self._batches.items(), key=lambda item: item[1].created_at))

    def add(self, source: Path, **facts: Any) -> Batch:
        """A new batch of the requests in a file."""
        batch = Batch(batch_id=new_id(PREFIX), created_at=time.time(), **facts)
        self.folder(batch).mkdir()
        try:
            os.link(source, self.input(batch))
        except FileNotFoundError:
            raise
        except OSError:  # a disk that knows no second names
            shutil.copyfile(source, self.input(batch))
        self.save(batch)
        sync(self._folder)
        with self._lock:
            self._batches[batch.batch_id] = batch
        return batch

    def save(self, batch: Batch) -> None:
        """Make what is known of it outlive us."""
        with self._saving:
            self._write(batch)

    def move(self, batch: Batch, *before: str, to: str) -> bool:
        """Change the status and save it, unless it is none of those `before`: somebody else was quicker."""
        with self._saving:
            if batch.status not in before:
                return False
            times = batch.times | {f"{to}_at": time.time()}
            self._write(dataclasses.replace(batch, status=to, times=times))  # nobody is told what is not on disk
            batch.status, batch.times = to, times
        return True

    def _write(self, batch: Batch) -> None:
        write_json(self.folder(batch) / "state.json", dataclasses.asdict(batch))

    def get(self, client: str, batch_id: str) -> Batch:
        """A batch of this client.

        Raises:
          ApiError: 404; that it is another's is not told.
        """
        with self._lock:
            batch = self._batches.get(batch_id)
        if batch is None or batch.client != client:
            raise ApiError(f"there is no batch {batch_id[:60]!r}", status=404, code="batch_not_found", param="batch_id")
        return batch

    def of(self, client: str) -> list[Batch]:
        """All batches of a client, oldest first."""
        with self._lock:
            return [batch for batch in self._batches.values() if batch.client == client]

    def unfinished(self) -> list[Batch]:
        """Those of all clients that have not ended, oldest first."""
        with self._lock:
            return [batch for batch in self._batches.values() if not batch.has_ended]

    def sweep(self) -> None:
        """Forget batches that ended long ago, and of each client all that have ended but the last ones."""
        oldest, kept = time.time() - self._ttl_s, Counter[str]()
        with self._lock:
            old = list[Batch]()
            for batch in reversed(self._batches.values()):
                if batch.has_ended:
                    kept[batch.client] += 1
                    if kept[batch.client] > _MOST_ENDED or max(batch.times.values()) < oldest:
                        old.append(batch)
            for batch in old:
                del self._batches[batch.batch_id]
        for batch in old:
            shutil.rmtree(self.folder(batch), ignore_errors=True)

    def tidy(self, batch: Batch) -> None:
        """It has ended: what it wrote on the way is of no more use."""
        for path in self.folder(batch).iterdir():
            if path.name != "state.json":
                path.unlink()

    def folder(self, batch: Batch) -> Path:
        """Of its files."""
        return self._folder / batch.batch_id

    def input(self, batch: Batch) -> Path:
        """Its requests."""
        return self.folder(batch) / "input.jsonl"

    def results(self, batch: Batch) -> Path:
        """Its answers and errors so far."""
        return self.folder(batch) / "results.jsonl"
