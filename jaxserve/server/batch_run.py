"""A batch from where it is to its end, in a thread of its own. Whatever has been done is on disk before the next is begun.

validating -> in_progress -> finalizing -> completed
failed: from validating, and where the engine fails again and again; expired and cancelled: from any but finalizing
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxserve.batch.flight import Flight
from jaxserve.batch.job import Item, Reader, check_frame, jobs
from jaxserve.batch.lines import Line, read_lines
from jaxserve.batch.plan import planned
from jaxserve.batch.results import append, code_of, open_results, result_line
from jaxserve.errors import DeviceError
from jaxserve.openai.errors import ApiError
from jaxserve.openai.ids import new_id
from jaxserve.server.batch_state import Batch, BatchStore
from jaxserve.server.files import BATCH_OUTPUT, FileStore
from jaxserve.server.lane import Lane, StoppedError

_MOST_ERRORS = 100  # that are told of a file that is no batch
_MOST_TOKENS = 1 << 21  # read ahead, to find prompts that begin alike; some 30 MB
_ATTEMPTS = 3  # without an answer, before it is the batch's fault that steps fail
_UNANSWERED = {
    "cancelled": "the batch was cancelled before this line was answered",
    "expired": "the completion_window was over before this line was answered",
    "failed": "the batch failed before this line was answered",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a file may hold."""

    max_lines: int
    max_line_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """All that a batch needs."""

    batch: Batch
    store: BatchStore
    files: FileStore
    lane: Lane
    reader: Reader
    limits: Limits

    def __call__(self) -> None:
        """Go on until the end, or until the server closes."""
        batch, move = self.batch, self.store.move
        try:
            if batch.status == "validating":
                self.lane.check()
                self._validate()
            if batch.status == "in_progress":
                self._answer()
                move(batch, "in_progress", to="finalizing")
            if batch.status == "finalizing":
                self._finish("completed")
            elif batch.status == "cancelling":
                self._finish("cancelled")
        except StoppedError as stopped:
            if stopped.reason != "closing":
                self._finish(stopped.reason)

    def fail(self, message: str) -> None:
        """End it. What has been answered is kept."""
        self.batch.errors = [{"code": "internal_error", "message": message, "line": None, "param": None}]
        self._finish("failed")

    def _lines(self) -> Iterator[Line]:
        with self.store.input(self.batch).open("rb") as file:
            for line in read_lines(file, self.limits.max_line_bytes):
                self.lane.check()
                yield line

    def _validate(self) -> None:
        """Look at each line but not into its body: a file that is no batch fails as a whole, as OpenAI has it."""
        errors, total = list[dict[str, Any]](), 0
        for number, _, content in self._lines():
            total += 1
            try:
                if total > self.limits.max_lines:
                    most = self.limits.max_lines
                    raise ApiError(f"a batch may have {most} lines (--max-batch-lines)", code="too_many_lines")
                if isinstance(content, ApiError):
                    raise content
                check_frame(content, self.reader.endpoints)
            except ApiError as error:
                errors.append({"code": code_of(error), "message": error.message, "line": number, "param": error.param})
                if len(errors) >= _MOST_ERRORS or error.code == "too_many_lines":
                    break
        if not total:
            errors.append({"code": "empty_file", "message": "the file has no lines", "line": None, "param": None})
        self.batch.total, self.batch.errors = total, errors
        if not errors:
            self.store.move(self.batch, "validating", to="in_progress")
        elif self.store.move(self.batch, "validating", to="failed"):
            self.store.tidy(self.batch)

    def _answer(self) -> None:
        """Answer what is not answered. What a failed step has cost is tried again."""
        batch, attempts = self.batch, 0
        while True:
            before = batch.completed + batch.failed
            try:
                return self._answer_rest()
            except DeviceError as error:
                attempts = 1 if batch.completed + batch.failed > before else attempts + 1
                if attempts >= _ATTEMPTS:
                    batch.errors = [{"code": "device_error", "message": str(error), "line": None, "param": None}]
                    raise StoppedError("failed") from None

    def _answer_rest(self) -> None:
        batch, lane = self.batch, self.lane
        results, answered = open_results(self.store.results(batch))
        with results:
            tally = Tally.of(self.store.results(batch))
            batch.completed, batch.failed = tally.completed, tally.failed
            items: Iterator[Item] = jobs((line for line in self._lines() if line[1] not in answered), self.reader)
            if lane.config.enable_prefix_caching:
                items = planned(lane, items, lambda _: None, most_tokens=_MOST_TOKENS, name=f"{batch.batch_id}.")
            with contextlib.closing(Flight(lane, items, lane.room).answers()) as answers:
                for number, custom_id, answer in answers:
                    append(results, result_line(number, custom_id, answer))
                    if isinstance(answer, ApiError):
                        batch.failed += 1
                    else:
                        batch.completed += 1

    def _finish(self, status: str) -> None:
        """Make files of the results. May be interrupted and begun again."""
        batch, store = self.batch, self.store
        if not batch.output_file_id:
            batch.output_file_id, batch.error_file_id = new_id("file-"), new_id("file-")
            store.save(batch)
        folder = store.folder(batch)
        tally = self._split(status, folder / "output", folder / "errors")
        for number, path, kind in ((tally.completed, folder / "output", "output"), (1, folder / "errors", "errors")):
            if number and path.stat().st_size:
                with path.open("rb") as file:
                    self.files.add(
                        file,
                        client=batch.client,
                        filename=f"{batch.batch_id}_{kind}.jsonl",
                        purpose=BATCH_OUTPUT,
                        ttl_s=batch.output_ttl_s,
                        file_id=batch.output_file_id if kind == "output" else batch.error_file_id,
                    )
            elif kind == "output":
                batch.output_file_id = ""
            else:
                batch.error_file_id = ""
        batch.completed, batch.failed, batch.usage = tally.completed, tally.failed, tally.usage()
        store.move(batch, batch.status, to=status)
        store.tidy(batch)

    def _split(self, status: str, output: Path, errors: Path) -> "Tally":
        """Answers here, errors there; lines without either are errors."""
        results, answered = open_results(self.store.results(self.batch))
        with results, output.open("wb") as good, errors.open("wb") as bad:
            results.seek(0)
            tally = Tally()
            for line in results:
                (good if tally.add(line) else bad).write(line)
            if status in _UNANSWERED and len(answered) < self.batch.total:
                told = {"code": f"batch_{status}", "message": _UNANSWERED[status]}
                with self.store.input(self.batch).open("rb") as file:
                    for number, key, _ in read_lines(file, self.limits.max_line_bytes):
                        if key not in answered:
                            line = {"id": new_id("batch_req_"), "custom_id": key, "response": None}
                            append(bad, line | {"error": told | {"line": number}})
        return tally


@dataclasses.dataclass(slots=True)
class Tally:
    """What result lines come to."""

    completed: int = 0
    failed: int = 0
    num_input: int = 0  # tokens
    num_cached: int = 0
    num_output: int = 0

    @classmethod
    def of(cls, path: Path) -> "Tally":
        """Of a file of them."""
        tally = cls()
        with path.open("rb") as file:
            for line in file:
                tally.add(line)
        return tally

    def add(self, line: bytes) -> bool:
        """One more; returns whether it is an answer."""
        result = json.loads(line)
        if result["error"] is not None:
            self.failed += 1
            return False
        self.completed += 1
        usage = result["response"]["body"].get("usage") or {}
        self.num_input += usage.get("prompt_tokens", 0)
        self.num_cached += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        self.num_output += usage.get("completion_tokens", 0)
        return True

    def usage(self) -> dict[str, Any]:
        """As OpenAI tells it of a batch."""
        return {
            "input_tokens": self.num_input,
            "input_tokens_details": {"cached_tokens": self.num_cached},
            "output_tokens": self.num_output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.num_input + self.num_output,
        }
