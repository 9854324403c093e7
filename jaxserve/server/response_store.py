"""Responses that can be asked for again, and whose conversations can go on. In memory, for as long as there is room."""

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from jaxserve.openai.envelope import dumps
from jaxserve.openai.messages import Message

_PER_MESSAGE = 1000  # bytes beside its texts, and for each of its calls, about


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """A response, and the conversation up to its end; instructions are no part of it."""

    response: bytes  # JSON
    messages: tuple[Message, ...]

    @property
    def num_bytes(self) -> int:
        """What it holds, about."""
        return len(self.response) + sum(map(_num_bytes, self.messages))


def _num_bytes(message: Message) -> int:
    calls = [(call.function.name, str(call.function.arguments), call.id) for call in message.tool_calls or ()]
    texts = (
        message.text,
        message.name,
        message.reasoning,
        message.tool_call_id,
        *(each for call in calls for each in call),
    )
    return _PER_MESSAGE * (1 + len(calls)) + sum(len(text or "") for text in texts)


class ResponseStore:
    """Who is not the client that a response was made for is told that there is none. The oldest make room."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._stored: OrderedDict[tuple[str, str], Stored] = OrderedDict()  # by client and id, the oldest first

    @property
    def is_on(self) -> bool:
        """Whether anything is stored at all."""
        return self._max_bytes > 0

    def put(self, client: str, response: dict[str, Any], messages: Sequence[Message]) -> None:
        """Keep a response."""
        made = Stored(dumps(response), tuple(messages))
        self._stored[client, response["id"]] = made
        self._num_bytes += made.num_bytes
        while self._num_bytes > self._max_bytes:
            _, oldest = self._stored.popitem(last=False)
            self._num_bytes -= oldest.num_bytes

    def get(self, client: str, response_id: str) -> Stored | None:
        """A response of this client; None if there is none (any more)."""
        return self._stored.get((client, response_id))

    def delete(self, client: str, response_id: str) -> bool:
        """Forget a response of this client. Returns whether there was one."""
        found = self._stored.pop((client, response_id), None)
        if found is not None:
            self._num_bytes -= found.num_bytes
        return found is not None
