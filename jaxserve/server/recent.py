"""The last requests and what became of them, for the page: figures and names, never a text."""

import dataclasses
import re
from collections import deque
from typing import Any

from jaxserve.clock import Clock
from jaxserve.openai import chat, completion, embedding, responses
from jaxserve.output import RequestOutput
from jaxserve.stream import Stream

_PREFIX = re.compile("[^-_]*[-_]?")
# By the beginning of a request's id, which tells the route that it came by. Others are shown as they are: score, batch.
_KINDS = {
    completion.PREFIX: "completions",
    chat.PREFIX: "chat",
    responses.PREFIX: "responses",
    embedding.PREFIX: "embeddings",
}


@dataclasses.dataclass(slots=True)
class Row:
    """One request. Times are seconds of the engine's clock; None: not yet, or never."""

    id: str
    kind: str
    model: str
    client: str
    arrival_s: float
    prompt_tokens: int
    started_s: float | None = None  # it got its first blocks, so its prompt was begun
    first_token_s: float | None = None
    finished_s: float | None = None
    cached_tokens: int = 0
    output_tokens: int = 0  # of all answers
    preemptions: int = 0
    finish_reason: str | None = None  # None: under way


@dataclasses.dataclass(slots=True)
class _Entry:
    row: Row
    stream: Stream | None  # until it has ended: a row remembers no prompt and no answer


class Recent:
    """A ring of the last `size` requests, in order of arrival. For the thread of the event loop."""

    def __init__(self, clock: Clock, model: str, size: int = 64):
        self._clock = clock
        self._model = model
        self._entries: deque[_Entry] = deque(maxlen=size)

    def add(self, stream: Stream) -> None:
        """Follow a request from now on. Nothing has to be said when it ends."""
        for entry in self._entries:
            if entry.stream is not None and entry.stream.is_ended:
                self._settle(entry, entry.stream)
        request = stream.request
        row = Row(
            id=request.request_id,
            kind=_kind(request.request_id),
            model=self._model,
            client=request.client,
            arrival_s=request.arrival_s or self._clock.now_s(),
            prompt_tokens=len(request.prompt_token_ids),
        )
        self._entries.append(_Entry(row, stream))

    def rows(self, client: str | None = None) -> list[dict[str, Any]]:
        """Newest first, as of now. With a client's name only its own."""
        for entry in self._entries:
            if entry.stream is not None:
                self._settle(entry, entry.stream)
        rows = (entry.row for entry in reversed(self._entries))
        return [dataclasses.asdict(row) for row in rows if client is None or row.client == client]

    def _settle(self, entry: _Entry, stream: Stream) -> None:
        """Bring a row up to date, and let go of its request if that has ended."""
        _update(entry.row, stream.output)
        if stream.is_ended:
            if entry.row.finish_reason is None:  # the engine refused it, or is no more
                entry.row.finish_reason, entry.row.finished_s = "error", self._clock.now_s()
            entry.stream = None


def _kind(request_id: str) -> str:
    prefix = _PREFIX.match(request_id)
    assert prefix is not None  # it may be empty
    return _KINDS.get(prefix[0], prefix[0].rstrip("-_"))


def _update(row: Row, output: RequestOutput | None) -> None:
    """What an output says now. It may be growing on another thread; each value is read once."""
    if output is None:
        return
    metrics = output.metrics
    row.arrival_s = metrics.arrival_s
    row.started_s = metrics.started_s
    row.first_token_s = metrics.first_token_s
    row.cached_tokens = metrics.num_cached_tokens
    row.preemptions = metrics.num_preemptions
    row.output_tokens = sum(len(answer.token_ids) for answer in output.outputs)
    if output.finished:
        row.finished_s = metrics.finished_s
        row.finish_reason = ", ".join(dict.fromkeys(answer.finish_reason or "" for answer in output.outputs))
