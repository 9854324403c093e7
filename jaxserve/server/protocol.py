"""Connections that do not wait for ever: uvicorn's protocol with limits of time and size.

uvicorn bounds neither the head of a request nor the time in which it comes, and waits without end for a caller who takes
nothing of the answer. A stream pays for these limits only when its caller falls behind.
"""

import asyncio
import fcntl
import functools
import struct
import termios
from collections.abc import Callable
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from jaxserve.openai.envelope import dumps
from jaxserve.openai.errors import ApiError
from jaxserve.server.config import ServerConfig
from jaxserve.server.json import error_response

_MAX_OPEN = 16  # requests sent one after another before the first is answered; no client of today does that
_MAX_UNREAD_BYTES = 64 << 20  # of a body that nobody reads: its sender may end it and read our answer, but not for ever


def protocol(config: ServerConfig) -> Callable[..., asyncio.Protocol]:
    """For `uvicorn.Config(http=...)`."""
    return functools.partial(LimitedProtocol, config)


class LimitedProtocol(HttpToolsProtocol):
    """One connection. A timer for what comes, another for what goes."""

    def __init__(self, limits: ServerConfig, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._limits = limits
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._num_head_bytes = 0  # with what came in the same piece
        self._num_unread_bytes = 0
        self._is_in_head = True  # before or inside of the head of a request
        self._open: list[RequestResponseCycle] = []  # requests that are not answered; nearly always one

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A caller."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(ApiError("there are too many connections already; try again later", status=503))
        else:
            self._read_within(self._limits.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._read_within(None)
        self._stop_writing()
        super().connection_lost(exc)
        for cycle in self._open:  # uvicorn tells it to the last one only
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        """A piece of a request, or of several."""
        if self._is_in_head:
            if not self._num_head_bytes:
                self._read_within(self._limits.header_timeout)
            self._num_head_bytes += len(data)
        elif self.cycle.response_complete:
            self._num_unread_bytes += len(data)
            if self._num_unread_bytes > _MAX_UNREAD_BYTES:
                return self.transport.abort()
        super().data_received(data)
        if self.transport.is_closing():
            return None
        if not self._is_in_head:
            self._read_within(self._limits.stall_timeout)
        elif self._num_head_bytes > self._limits.max_header_bytes:
            self._refuse(_too_long(self._limits))
        return None

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._is_in_head = False
        limit = self._limits.max_header_bytes
        if self._num_head_bytes > limit and self._head_bytes() > limit:
            self.app = functools.partial(_tell, _too_long(self._limits))
        super().on_headers_complete()
        self._open = [cycle for cycle in self._open if not cycle.response_complete]
        self._open.append(self.cycle)
        if len(self._open) > _MAX_OPEN:
            self.transport.abort()

    def on_message_complete(self) -> None:
        """So is the body."""
        self._is_in_head = True
        self._num_head_bytes = self._num_unread_bytes = 0
        self._read_within(None)
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The caller is behind by more than the connection holds."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._stop_writing()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing has come for some time. What is left of the answer may be taken still, but not for ever."""
        super().timeout_keep_alive_handler()
        self._watch_reader()

    def _read_within(self, seconds: float | None) -> None:
        """Drop the connection then, unless this is called again."""
        if self._reading is not None:
            self._reading.cancel()
        self._reading = None if seconds is None else self.loop.call_later(seconds, self._read_nothing)

    def _read_nothing(self) -> None:
        if self.flow.read_paused:  # it is us who do not read
            self._read_within(self._limits.stall_timeout)
        else:
            self.transport.abort()

    def _watch_reader(self) -> None:
        """Drop the connection when nothing of what is to be sent is taken for some time."""
        self._stop_writing()
        seconds, left = self._limits.stall_timeout, _num_untaken(self.transport)
        self._writing = self.loop.call_later(seconds, self._look_at_reader, left)

    def _look_at_reader(self, before: int) -> None:
        if _num_untaken(self.transport) < before:
            self._watch_reader()
        else:
            self.transport.abort()

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _refuse(self, told: ApiError) -> None:
        content = dumps(told.body())
        head = f"HTTP/1.1 {told.status} \r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        self.transport.close()
        self._watch_reader()


def _num_untaken(transport: asyncio.Transport) -> int:
    """Bytes that the other side has not taken: ours, and on Linux those that wait in the system's buffer of some MiB."""
    left = transport.get_write_buffer_size()
    try:
        return (
            left + struct.unpack("i", fcntl.ioctl(transport.get_extra_info("socket"), termios.TIOCOUTQ, b"....")[:4])[0]
        )
    except (OSError, ValueError):  # not Linux, or closed
        return left


async def _tell(told: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await error_response(told, headers={"connection": "close"})(scope, receive, send)


def _too_long(limits: ServerConfig) -> ApiError:
    return ApiError(f"the head of the request is longer than {limits.max_header_bytes} bytes", status=431)
