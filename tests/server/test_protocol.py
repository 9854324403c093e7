"""Connections of callers who send or take nothing, over real sockets, with an app of a few lines."""

import asyncio
import json
import socket
import time
from types import SimpleNamespace

import pytest

from jaxserve.server.config import ServerConfig
from jaxserve.server.protocol import protocol
from tests.server.conftest import serving

LIMITS = ServerConfig(
    header_timeout=0.3, stall_timeout=0.4, keep_alive_timeout=5, max_header_bytes=2000, max_connections=20
)
CHUNK = b"x" * 10_000


class App:
    """Reads bodies, streams without end on /endless, and notes how requests ended."""

    def __init__(self):
        self.ended = []
        self.num_chunks = 0
        self.state = SimpleNamespace()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            return await send({"type": "lifespan.shutdown.complete"})
        try:
            while (message := await receive()).get("more_body"):
                pass
            if message["type"] == "http.disconnect":
                return self.ended.append("gone while sending")
            await send({"type": "http.response.start", "status": 200, "headers": []})
            if scope["path"] == "/endless":
                await self._endless(receive, send)
                return self.ended.append("gone while taking")
            await send({"type": "http.response.body", "body": b"ok"})
            self.ended.append("ok")
        except BaseException as error:
            self.ended.append(repr(error))
            raise

    async def _endless(self, receive, send):
        gone = asyncio.ensure_future(receive())
        while not gone.done():
            sending = asyncio.ensure_future(send({"type": "http.response.body", "body": CHUNK, "more_body": True}))
            await asyncio.wait((gone, sending), return_when=asyncio.FIRST_COMPLETED)
            sending.cancel()
            self.num_chunks += 1
            await asyncio.sleep(0)


@pytest.fixture(scope="module")
def server():
    with serving(App(), http=protocol(LIMITS), ws="none", timeout_keep_alive=LIMITS.keep_alive_timeout) as running:
        yield running


@pytest.fixture
def connect(server):
    """Open a connection."""
    server.app.ended.clear()
    opened = []

    def made(receive_buffer=None):
        connection = socket.socket()
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(5)
        connection.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        opened.append(connection)
        return connection

    yield made
    for connection in opened:
        connection.close()


def closed_after(connection) -> tuple[float, bytes]:
    """Seconds until the other side has closed it, and what it had said."""
    begun, said = time.monotonic(), b""
    try:
        while piece := connection.recv(1 << 16):
            said += piece
    except ConnectionResetError:
        pass
    return time.monotonic() - begun, said


def wait_for(condition):
    end_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_who_sends_no_request_or_half_a_head_is_dropped(connect, server):
    silent, slow = connect(), connect()
    slow.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n")
    for _ in range(4):
        time.sleep(0.05)
        slow.sendall(b"a: b\r\n")  # a byte now and then does not help
    assert closed_after(slow)[0] < 1
    assert closed_after(silent)[0] < 1
    assert server.app.ended == []


def test_who_stops_in_the_middle_of_a_body_is_dropped_and_the_app_is_told(connect, server):
    connection = connect()
    connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
    took_s, said = closed_after(connection)
    assert 0.2 < took_s < 2 and said == b""
    wait_for(lambda: server.app.ended == ["gone while sending"])


def test_a_body_that_keeps_coming_is_waited_for(connect, server):
    connection = connect()
    connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nConnection: close\r\n\r\n")
    for byte in b"hello":
        time.sleep(0.15)
        connection.sendall(bytes([byte]))
    assert closed_after(connection)[1].startswith(b"HTTP/1.1 200")


def test_who_takes_none_of_the_answer_is_dropped_and_the_app_is_told(connect, server):
    connection = connect(receive_buffer=4096)
    before = server.app.num_chunks
    connection.sendall(b"POST /endless HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_for(lambda: server.app.ended == ["gone while taking"])
    assert (server.app.num_chunks - before) * len(CHUNK) < 16 << 20, "what is not taken piles up"


def test_who_takes_it_slowly_is_not(connect, server):
    connection = connect(receive_buffer=4096)
    connection.sendall(b"POST /endless HTTP/1.1\r\nHost: x\r\n\r\n")
    end_s = time.monotonic() + 1.5
    while time.monotonic() < end_s:
        connection.recv(1 << 16)
        time.sleep(0.01)
    assert server.app.ended == []
    connection.close()
    wait_for(lambda: server.app.ended == ["gone while taking"])


def test_a_second_request_behind_the_first_does_not_stop_the_clock(connect, server):
    connection = connect(receive_buffer=4096)
    connection.sendall(b"POST /endless HTTP/1.1\r\nHost: x\r\n\r\nPOST / HTTP/1.1\r\nHost: x\r\n\r\n")
    wait_for(lambda: server.app.ended == ["gone while taking"])


@pytest.mark.parametrize("ends", [True, False], ids=["whole", "without an end"])
def test_a_long_head_is_refused(connect, server, ends):
    connection = connect()
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\na: " + b"b" * 3000 + (b"\r\n\r\n" if ends else b""))
    took_s, said = closed_after(connection)
    assert said.startswith(b"HTTP/1.1 431") and took_s < 0.25
    assert "2000 bytes" in json.loads(said.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert server.app.ended == []


def test_a_long_body_in_one_piece_with_a_short_head_is_no_long_head(connect):
    connection = connect()
    connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 9000\r\n\r\n" + b"b" * 9000)
    assert closed_after(connection)[1].startswith(b"HTTP/1.1 200")


def test_connections_are_bounded_and_others_may_come_when_some_have_gone(connect):
    some = [connect() for _ in range(20)]
    refused = connect()
    assert closed_after(refused)[1].startswith(b"HTTP/1.1 503")
    for connection in some:
        assert closed_after(connection)[1] == b""  # by their own clocks
    again = connect()
    again.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert closed_after(again)[1].startswith(b"HTTP/1.1 200")


def test_a_connection_is_kept_for_many_requests(connect, server):
    connection = connect()
    for number in range(5):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda number=number: len(server.app.ended) == number + 1)
        time.sleep(0.1)
    time.sleep(0.5)  # longer than all clocks but that of connections between requests
    connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert closed_after(connection)[1].count(b"200 OK") == 6
