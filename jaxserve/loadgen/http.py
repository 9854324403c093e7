"""HTTP/1.1 on asyncio: connections that are kept, and replies whose parts are handed on in the call that brought them.

Libraries have a coroutine, a queue and some objects for each part of a reply, which cost more than a token's few bytes:
`benchmarks/server/client.py` says how much.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Mapping
from typing import Protocol, cast
from urllib.parse import urlsplit

from jaxserve.errors import ConfigError

_MOST_HEAD = 65_536  # bytes of status and headers


class BrokenReply(Exception):  # noqa: N818  a reply that broke, not a mistake of ours
    """The connection ended before the reply did, or what came is no HTTP. The text says which."""


class Sink(Protocol):
    """Takes a reply."""

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        """Comes first. Names of headers are in lower case."""
        ...

    def part(self, data: bytes) -> None:
        """Bytes of the body, as they arrive."""
        ...


class Host:
    """A server at an address: `exchange` sends a request over an idle connection, or a new one.

    Raises:
      ConfigError: the address is no URL of a server.
    """

    def __init__(self, url: str, context: ssl.SSLContext | None = None):
        try:
            parts = urlsplit(url)
            port, host = parts.port, parts.hostname
        except ValueError:
            port = host = None
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigError(f"{url!r:.200} is no address of a server", remedy="Write it like http://127.0.0.1:8000")
        self.url = url
        self._context = (context or ssl.create_default_context()) if parts.scheme == "https" else None
        self._address = (host, port or (443 if self._context else 80))
        self._name = parts.netloc.rpartition("@")[2]
        self._prefix = parts.path.rstrip("/")
        self._idle: list[Connection] = []

    async def exchange(self, method: str, path: str, headers: Mapping[str, str], body: bytes, sink: Sink) -> None:
        """Send a request and hand the reply to `sink`; returns when all of it was there.

        Raises:
          BrokenReply: the reply did not come to its end.
          OSError: no connection could be made.
        """
        lines = [f"{method} {self._prefix}{path} HTTP/1.1", f"Host: {self._name}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        request = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode("latin-1") + body
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                try:
                    await self._send(connection, request, sink)
                    return
                except BrokenReply:
                    if connection.has_begun:
                        raise
                    # The server had closed it while it was idle.
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, *self._address, ssl=self._context)
        await self._send(connection, request, sink)

    async def _send(self, connection: "Connection", request: bytes, sink: Sink) -> None:
        await connection.exchange(request, sink)
        if connection.is_open:
            self._idle.append(connection)

    async def close(self) -> None:
        """Close the idle connections. Those of cancelled exchanges are closed already."""
        while self._idle:
            self._idle.pop().close()
        await asyncio.sleep(0)  # the loop closes them in its next round


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self.is_open = False
        self.has_begun = False  # whether any of the reply was there
        self._transport: asyncio.Transport | None = None
        self._sink: Sink | None = None
        self._done: asyncio.Future[None] | None = None
        self._left = b""  # of the last read, to be read again together with the next
        self._start()

    def _start(self) -> None:
        self.has_begun = False
        self._in_body = self._is_chunked = self._is_last = self._is_kept = False
        self._need: int | None = 0  # bytes of the chunk or body still to come; None: all until the connection closes

    async def exchange(self, request: bytes, sink: Sink) -> None:
        """See `Host.exchange`. Whoever is cancelled closes the connection."""
        assert self._transport is not None and self._done is None
        self._start()
        self._sink, self._done = sink, asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        except BaseException:
            self.close()
            raise
        finally:
            self._sink = self._done = None
        if not self._is_kept:
            self.close()

    def close(self) -> None:
        """Close at once, whatever is under way."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio calls this."""
        self._transport, self.is_open = cast(asyncio.Transport, transport), True

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio calls this."""
        self.is_open = False
        if self._in_body and self._need is None and exc is None:
            self._end(None)
        else:
            self._end(BrokenReply("the server closed the connection before the answer's end"))

    def data_received(self, data: bytes) -> None:
        """asyncio calls this."""
        if self._sink is None:  # nobody asked
            return self.close()
        self.has_begun = True
        data, self._left = self._left + data if self._left else data, b""
        try:
            at = self._body(data, 0) if self._in_body else self._head(data)
        except Exception as error:  # noqa: BLE001  a sink that fails must not be a connection that hangs
            return self._end(error)
        self._left = data[at:]
        return None

    def _head(self, data: bytes) -> int:
        """Status and headers, then what there is of the body. Like `_body`, returns up to where `data` was read."""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > _MOST_HEAD:
                raise BrokenReply("the reply is no HTTP: its headers have no end")
            return 0
        first, *lines = data[:end].decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1."):
            raise BrokenReply(f"the reply is no HTTP: it begins with {first[:20]!r}")
        status = _number(rest[:3])
        if status == 100:  # go on
            return self._head(data[end + 4 :]) + end + 4
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        kept = headers.get("connection", "keep-alive" if version == "HTTP/1.1" else "close").lower()
        self._in_body, self._is_kept = True, kept == "keep-alive"
        self._is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        if not self._is_chunked:
            self._need = _number(headers["content-length"]) if "content-length" in headers else None
            self._is_kept = self._is_kept and self._need is not None
        assert self._sink is not None
        self._sink.head(status, headers)
        return self._body(data, end + 4)

    def _body(self, data: bytes, at: int) -> int:
        sink = self._sink
        assert sink is not None
        while self._is_chunked:
            if self._need:
                part = data[at : at + self._need]
                if not part:
                    return at
                at += len(part)
                self._need -= len(part)
                sink.part(part)
                continue
            end = data.find(b"\n", at)
            if end < 0:
                return at
            line, at = data[at:end].strip(), end + 1
            if line and not self._is_last:  # an empty line ends the chunk before
                self._need = _number(line.partition(b";")[0], 16)
                self._is_last = not self._need
            elif not line and self._is_last:
                self._end(None)
                return at
        part = data[at:] if self._need is None else data[at : at + self._need]
        if part:
            sink.part(part)
        if self._need is not None:
            self._need -= len(part)
            if not self._need:
                self._end(None)
        return at + len(part)

    def _end(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            with contextlib.suppress(asyncio.InvalidStateError):
                self._done.set_result(None) if error is None else self._done.set_exception(error)


def _number(text: str | bytes, base: int = 10) -> int:
    try:
        return int(text, base)
    except ValueError:
        raise BrokenReply(f"the reply is no HTTP: {text[:20]!r} is no number") from None
