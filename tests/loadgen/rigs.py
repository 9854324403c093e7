"""A server that plays scripts, and an event loop on which time jumps: what takes seconds in a script takes none here."""

import asyncio
import json
import selectors
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from jaxserve.loadgen.client import Client
from jaxserve.loadgen.http import Host

Script = Sequence[tuple[float, bytes] | None]  # seconds to wait, then what is sent; None: hang up
_GRACE_S = 0.002  # for bytes that are under way between two sockets of this process


class _Jumping(selectors.DefaultSelector):
    now_s = 1000.0

    def select(self, timeout=None):
        ready = super().select(min(_GRACE_S, timeout) if timeout is not None else 5.0)
        assert ready or timeout is not None, "nothing will ever happen"
        if not ready and timeout > 0:
            self.now_s += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self):
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self):
        return self._jumping.now_s


def on_virtual_time(main: Callable[[], Awaitable[Any]]) -> Any:
    """`asyncio.run`, where nobody waits."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(main())


class FakeServer:
    """Answers each request by `respond(path, body)`: status, headers, script. Counts connections and requests."""

    def __init__(self, respond: Callable[[str, Any], tuple[int, dict[str, str], Script]]):
        self._respond = respond
        self.connections = self.under_way = self.most_under_way = 0
        self._clients = list[Client]()
        self.heads, self.bodies, self.times = list[str](), list[Any](), list[float]()

    async def __aenter__(self) -> "FakeServer":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for client in self._clients:
            await client.close()

    def client(self, **options: Any) -> Client:
        options = {"headers": {}, "timeout_s": 3600.0, "clock": asyncio.get_running_loop().time} | options
        self._clients.append(Client(Host(self.url), **options))
        return self._clients[-1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0] or 0)
        body = await reader.readexactly(length)
        self.heads.append(head)
        self.bodies.append(json.loads(body) if body else None)
        self.times.append(asyncio.get_running_loop().time())
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            status, headers, script = self._respond(head.split()[1], self.bodies[-1])
            lines = [f"HTTP/1.1 {status} Whatever", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
            writer.write("\r\n".join(lines).encode())
            for each in script:
                if each is None:
                    return False
                delay_s, data = each
                await asyncio.sleep(delay_s)
                writer.write(data)
                await writer.drain()
        finally:
            self.under_way -= 1
        return headers.get("Connection") != "close"


EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Transfer-Encoding": "chunked"}


def chunk(data: bytes) -> bytes:
    """One part of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def text(piece: str, reason: str | None = None) -> bytes:
    """An event of /v1/completions."""
    return event({"choices": [{"index": 0, "text": piece, "finish_reason": reason}]})


def usage(num_prompt: int, num_output: int) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_output}})


DONE = event(b"[DONE]")
END = b"0\r\n\r\n"


def streamed(*parts: tuple[float, bytes]) -> tuple[int, dict[str, str], Script]:
    """A good answer: parts after their delays, then the end."""
    return 200, EVENTS, [*((delay_s, chunk(data)) for delay_s, data in parts), (0, chunk(DONE) + END)]
