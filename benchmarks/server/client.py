"""CPU of a client for each token it receives: ours, and the libraries that are installed (httpx, aiohttp, openai).

    python benchmarks/server/client.py

A server in a process of its own sends the same stream over 64 connections, a chunk to each every few milliseconds, as an
engine does. Every client reads the JSON of each chunk and notes the time.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from record import append
from server.rig import load

from jaxserve.loadgen.client import Client
from jaxserve.loadgen.http import Host

RESULTS = Path(__file__).resolve().parent.parent / "results" / "server.jsonl"
STREAMS, TOKENS, PAUSE_S = 64, 128, 0.005
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
BODY = {"model": "m", "prompt": "x", "stream": True}


def _chunk(reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": reason}
    whole = {"id": "cmpl-" + "0" * 32, "object": "text_completion", "created": 1, "model": "m", "choices": [choice]}
    data = b"data: " + json.dumps(whole | {"usage": None}).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


def serve(pipe: Pipe) -> None:
    """Answer every request with the same stream."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        plain, last = _chunk(), _chunk("length") + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]))
                writer.write(HEAD)
                for number in range(TOKENS):
                    writer.write(plain if number < TOKENS - 1 else last)
                    await asyncio.sleep(PAUSE_S)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        pipe.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        await server.serve_forever()

    asyncio.run(main())


async def ours(url: str) -> list[int]:
    """Tokens of each stream."""
    client = Client(Host(url), headers={}, timeout_s=60)
    body = json.dumps(BODY).encode()
    answers = await asyncio.gather(*(client.ask("/v1/completions", body) for _ in range(STREAMS)))
    await client.close()
    return [answer.num_chunks for answer in answers]


async def httpx(url: str) -> list[int]:
    """The same through httpx, line by line."""
    import httpx

    async def one(client: httpx.AsyncClient) -> int:
        times = list[float]()
        async with client.stream("POST", f"{url}/v1/completions", json=BODY) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                    times.append(time.perf_counter())
        return len(times)

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60) as client:
        return await asyncio.gather(*(one(client) for _ in range(STREAMS)))


async def aiohttp(url: str) -> list[int]:
    """The same through aiohttp, line by line."""
    import aiohttp  # pyright: ignore[reportMissingImports]

    async def one(session: aiohttp.ClientSession) -> int:
        times = list[float]()
        async with session.post(f"{url}/v1/completions", json=BODY) as response:
            async for line in response.content:
                if line.startswith(b"data: {") and json.loads(line[6:])["choices"]:
                    times.append(time.perf_counter())
        return len(times)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        return await asyncio.gather(*(one(session) for _ in range(STREAMS)))


async def openai(url: str) -> list[int]:
    """The same through OpenAI's package."""
    import openai

    async def one(client: openai.AsyncOpenAI) -> int:
        times = list[float]()
        async for chunk in await client.completions.create(model="m", prompt="x", stream=True):
            if chunk.choices:
                times.append(time.perf_counter())
        return len(times)

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        return await asyncio.gather(*(one(client) for _ in range(STREAMS)))


CLIENTS: dict[str, Callable[[str], Awaitable[list[int]]]] = {
    "jaxserve": ours,
    "httpx": httpx,
    "aiohttp": aiohttp,
    "openai": openai,
}


def main() -> int:
    """Measure in turn, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    process.start()
    url = here.recv()
    known = [name for name in CLIENTS if name == "jaxserve" or importlib.util.find_spec(name)]
    found: dict[str, list[float]] = {name: [] for name in known}
    for number in range(options.repeats + 1):
        for name in known:
            began = time.process_time()
            counts = asyncio.run(CLIENTS[name](url))  # pyright: ignore[reportArgumentType]
            spent = time.process_time() - began
            if counts != [TOKENS] * STREAMS:
                raise SystemExit(f"{name} has lost tokens: {counts}")
            found[name] += [1e6 * spent / (STREAMS * TOKENS)] if number else []
    for name, values in found.items():
        print(f"{name:<10}{statistics.median(values):8.1f} us of CPU a token")
        if not options.no_record:
            case = {"what": f"client: {name}", "concurrency": STREAMS} | load()
            append(RESULTS, case, "CPU time per received token", "us", values)
    process.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
