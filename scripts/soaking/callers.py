"""What callers do, good ones and bad ones. Each returns how its request ended; AssertionError: a law was broken."""

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

from soaking.server import KEYS, MAX_BODY_BYTES, STALL_S, Server, bearer

PROMPTS = ("def add(a, b):", "import os\n", "class Stack:\n    def", "for i in range(", "# sort a list\n", "x = {")
LATER = (429, 503, 504)  # refused for now: also an end, and only one
WORDS = {"prompt": PROMPTS[0], "max_tokens": 600, "ignore_eos": True}
Call = Callable[["Caller"], Awaitable[str]]


class Caller:
    """One of those who ask."""

    def __init__(self, server: Server, client: httpx.AsyncClient, rng: random.Random, known: dict[str, str]):
        self.server = server
        self.client = client
        self.rng = rng
        self.known = known  # prompt -> answer of 24 tokens without randomness
        self.name = rng.choice(list(KEYS))
        self.key = bearer(self.name)

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Whatever is answered must be JSON, and an error ours."""
        answer = await self.client.post(f"{self.server.url}{path}", json=body, headers=self.key, **options)
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["message"] and "type" in error, answer.text
            assert answer.status_code < 500 or answer.status_code in LATER, (path, answer.status_code, answer.text)
        return answer

    async def frames(self, body: dict[str, Any], path: str = "/v1/completions") -> AsyncIterator[dict[str, Any]]:
        """Of a stream, which must end once and in order. A refusal comes as {"status": N}."""
        asked = {"json": body | {"stream": True}, "headers": self.key}
        async with self.client.stream("POST", f"{self.server.url}{path}", **asked) as answer:
            if answer.status_code != 200:
                await answer.aread()
                assert answer.status_code in LATER, answer.text
                yield {"status": answer.status_code}
                return
            is_done = False
            try:
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        assert not is_done, "something follows the end"
                        is_done = line == "data: [DONE]"
                        if not is_done:
                            yield json.loads(line[6:])
            except httpx.TransportError as error:
                raise AssertionError(f"an accepted stream was cut without a word: {error!r}") from None
            assert is_done, "a stream has no end"


async def whole(caller: Caller) -> str:
    """A plain answer, or several."""
    n, prompt = caller.rng.choice((1, 1, 2, 3)), caller.rng.choice(PROMPTS)
    answer = await caller.post("/v1/completions", {"prompt": prompt, "max_tokens": 24, "temperature": 0, "n": n})
    if answer.status_code != 200:
        return str(answer.status_code)
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(n))
    for choice in choices:
        _same(caller, prompt, choice["text"])
    return "ok"


async def stream(caller: Caller) -> str:
    """The same in pieces."""
    n, prompt = caller.rng.choice((1, 1, 2)), caller.rng.choice(PROMPTS)
    texts, ends = [""] * n, [0] * n
    async for frame in caller.frames({"prompt": prompt, "max_tokens": 24, "temperature": 0, "n": n}):
        if "status" in frame:
            return str(frame["status"])
        if "error" in frame:
            assert caller.server.is_going or frame["error"]["code"] == "timeout", frame
            return "told in the stream"
        for choice in frame["choices"]:
            assert not ends[choice["index"]], "an answer goes on after its end"
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] += bool(choice["finish_reason"])
    assert ends == [1] * n, f"answers ended {ends} times"
    for text in texts:
        _same(caller, prompt, text)
    return "ok"


def _same(caller: Caller, prompt: str, text: str) -> None:
    expected = caller.known.setdefault(prompt, text)
    assert text == expected, f"{prompt!r} was answered {text!r}, and before {expected!r}"


async def chat(caller: Caller) -> str:
    """A conversation, streamed, with usage at the end."""
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 16, "temperature": 1.0}
    frames = [
        f async for f in caller.frames(asked | {"stream_options": {"include_usage": True}}, "/v1/chat/completions")
    ]
    if "status" in frames[0]:
        return str(frames[0]["status"])
    if "error" in frames[-1]:
        assert caller.server.is_going, frames[-1]
        return "told in the stream"
    ends = [c["finish_reason"] for frame in frames for c in frame["choices"] if c["finish_reason"]]
    assert len(ends) == 1 and frames[-1]["usage"]["completion_tokens"] >= 1
    return "ok"


async def others(caller: Caller) -> str:
    """Routes that make no tokens, or make them under other names."""
    path, body = caller.rng.choice(
        (
            ("/v1/embeddings", {"input": list(PROMPTS[:3])}),
            ("/tokenize", {"prompt": PROMPTS[1]}),
            ("/v1/responses", {"input": PROMPTS[0], "max_output_tokens": 8}),
            ("/v1/completions", {"prompt": list(PROMPTS), "max_tokens": 1, "echo": True, "logprobs": 2}),
        )
    )
    return _ended(await caller.post(path, body))


async def shaped(caller: Caller) -> str:
    """An answer that must follow a schema."""
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}}}
    asked = {"messages": [{"role": "user", "content": "a number"}], "max_tokens": 40, "response_format": wanted}
    answer = await caller.post("/v1/chat/completions", asked)
    if answer.status_code == 200 and answer.json()["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(answer.json()["choices"][0]["message"]["content"])["a"], int)
    return _ended(answer)


async def hostile_schema(caller: Caller) -> str:
    """A schema that is deep or wide: refused or served, and nobody else's matter."""
    schema: dict[str, Any] = {"type": "string", "pattern": "(a{1,200}){1,200}b"}
    for _ in range(caller.rng.choice((3, 60, 400))):
        schema = {"type": "object", "properties": {"x": schema, "y": schema}, "required": ["x"]}
        if len(json.dumps(schema)) > MAX_BODY_BYTES // 4:
            break
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8, "response_format": wanted}
    return _ended(await caller.post("/v1/chat/completions", asked, timeout=90), 400)


async def leaves(caller: Caller) -> str:
    """Goes away in the middle of an answer."""
    left = caller.rng.randrange(1, 30)
    frames = caller.frames(WORDS | {"n": caller.rng.choice((1, 4))})
    async with contextlib.aclosing(frames):
        async for frame in frames:
            if "status" in frame:
                return str(frame["status"])
            left -= 1
            if not left or "error" in frame:
                break
    return "left"


async def leaves_early(caller: Caller) -> str:
    """Does not wait for the answer at all."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(caller.rng.uniform(0.0, 0.3)):
            await caller.post("/v1/completions", WORDS)
    return "left"


async def too_late(caller: Caller) -> str:
    """Wants the answer sooner than it can be."""
    answer = await caller.post("/v1/completions", WORDS | {"deadline_ms": caller.rng.choice((1, 50))})
    return _ended(answer, 504)


async def wrong(caller: Caller) -> str:
    """Bodies that are none."""
    body = caller.rng.choice(
        (
            b"{",
            b"",
            b"\xff\xfe",
            b"[" * 50_000,
            b'{"a":' * 20_000,
            b'{"prompt": "x", "temperature": NaN}',
            b'{"prompt": "x", "temprature": 1}',
            b'{"prompt": "\\ud800"}',
            b'{"prompt": [99999999]}',
            b'{"prompt": "x", "n": 100000}',
            b'{"prompt": []}',
            b'{"prompt": "x", "max_tokens": 1e99}',
        )
    )
    url = f"{caller.server.url}/v1/completions"
    answer = await caller.client.post(url, content=body, headers=caller.key)
    return _ended(answer, 400)


async def oversize(caller: Caller) -> str:
    """Bodies that are too long, with and without saying so."""
    size = MAX_BODY_BYTES * caller.rng.choice((2, 10))

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(size // 10_000):
            yield b" " * 10_000

    content = pieces() if caller.rng.random() < 0.5 else b" " * size
    answer = await caller.client.post(f"{caller.server.url}/v1/completions", content=content, headers=caller.key)
    return _ended(answer, 413)


async def nobody(caller: Caller) -> str:
    """Has no key, or a wrong one, or says to be somebody else."""
    body, url = {"prompt": "x"}, f"{caller.server.url}/v1/completions"
    headers = caller.rng.choice(({}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": "Basic eA=="}))
    answer = await caller.client.post(url, json=body, headers=headers)
    assert answer.status_code == 401, answer.text
    other = "bob" if caller.name != "bob" else "ada"
    spoofed = await caller.post("/v1/completions", body | {"client": other})
    return _ended(spoofed, 403)


async def files(caller: Caller) -> str:
    """Keeps a file, which nobody else can read, and throws it away."""
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 2}}
    form = {"file": ("../../etc/x.jsonl", json.dumps(line).encode()), "purpose": (None, "batch")}
    answer = await caller.client.post(f"{caller.server.url}/v1/files", files=form, headers=caller.key)
    if answer.status_code != 200:
        return _ended(answer)
    url = f"{caller.server.url}/v1/files/{answer.json()['id']}"
    other = bearer("bob" if caller.name != "bob" else "ada")
    assert (await caller.client.get(url, headers=other)).status_code in (404, *LATER)
    return _ended(await caller.client.delete(url, headers=caller.key))


async def slow_reader(caller: Caller) -> str:
    """Takes nothing of a long answer, until it is dropped."""
    body = json.dumps(WORDS | {"n": 8, "logprobs": 5, "max_tokens": 1200, "stream": True}).encode()
    with _socket(caller.server.url, receive_buffer=2048) as connection:
        await _send(connection, caller, b"POST /v1/completions", body)
        await asyncio.sleep(STALL_S * caller.rng.uniform(0.5, 3))
    return "left"


async def slow_sender(caller: Caller) -> str:
    """Sends half of a head, or of a body, and waits to be dropped."""
    with _socket(caller.server.url) as connection:
        loop = asyncio.get_running_loop()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        if caller.rng.random() < 0.5:
            head += f"Authorization: {caller.key['Authorization']}\r\nContent-Length: 99\r\n\r\n{{".encode()
        await loop.sock_sendall(connection, head)
        async with asyncio.timeout(STALL_S + 25):
            with contextlib.suppress(ConnectionResetError):
                said = await loop.sock_recv(connection, 1000)
                assert said[:12] in (b"", b"HTTP/1.1 503", b"HTTP/1.1 429"), (
                    f"half a request was answered: {said!r:.80}"
                )
    return "dropped"


async def garbage(caller: Caller) -> str:
    """No HTTP, a head without end, or many requests at once."""
    with _socket(caller.server.url) as connection:
        loop = asyncio.get_running_loop()
        endless, many = b"GET / HTTP/1.1\r\na: " + b"b" * 99_999, b"GET /x HTTP/1.1\r\n\r\n" * 99
        said = caller.rng.choice((b"\x16\x03\x01\x00" * 50, endless, many))
        async with asyncio.timeout(STALL_S + 25):
            with contextlib.suppress(ConnectionError):
                await loop.sock_sendall(connection, said)
                await loop.sock_recv(connection, 1000)
    return "dropped"


CALLS: dict[Call, int] = {
    whole: 6,
    stream: 8,
    chat: 4,
    others: 4,
    shaped: 2,
    hostile_schema: 1,
    leaves: 5,
    leaves_early: 3,
    too_late: 2,
    wrong: 4,
    oversize: 2,
    nobody: 3,
    files: 2,
    slow_reader: 1,
    slow_sender: 1,
    garbage: 1,
}  # call -> how often


def _ended(answer: httpx.Response, *expected: int) -> str:
    """`expected`: statuses besides 200 that are right; those above 400 are right alone."""
    allowed = {200, *expected} if set(expected) <= {400, 504} else set(expected)
    assert answer.status_code in allowed | set(LATER), f"{answer.status_code}: {answer.text:.300}"
    return "ok" if answer.status_code in (expected or allowed) else str(answer.status_code)


def _socket(url: str, receive_buffer: int | None = None) -> socket.socket:
    made = socket.socket()
    if receive_buffer:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        made.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
    except OSError:
        made.close()
        raise
    made.setblocking(False)
    return made


async def _send(connection: socket.socket, caller: Caller, what: bytes, body: bytes) -> None:
    head = f"Host: localhost\r\nAuthorization: {caller.key['Authorization']}\r\nContent-Length: {len(body)}\r\n\r\n"
    await asyncio.get_running_loop().sock_sendall(connection, what + b" HTTP/1.1\r\n" + head.encode() + body)
