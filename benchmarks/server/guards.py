"""What stands before the routes, per request and per chunk of a stream: CPU time of this process, no network, no engine.

    python benchmarks/server/guards.py

Each row: options, microseconds for a request, nanoseconds for a chunk. The first has no guards.
"""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

from jaxserve.server.config import ServerConfig
from jaxserve.server.guards import guards
from jaxserve.server.state import ServerState

NUM_REQUESTS, NUM_CHUNKS = 3000, 100_000
CASES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "default": {},
    "one key": {"api_key": ["sk-0"]},
    "100 keys": {"api_key": [f"sk-{number}" for number in range(100)]},
    "key, rates": {"api_key": ["sk-0"], "requests_per_minute": 10**9, "tokens_per_minute": 10**9},
    "key, rates, timeout": {
        "api_key": ["sk-0"],
        "requests_per_minute": 10**9,
        "tokens_per_minute": 10**9,
        "request_timeout": 600.0,
    },
}


def guarded(options: dict[str, Any] | None, num_chunks: int) -> tuple[Any, dict[str, Any]]:
    """An app that sends chunks, and the scope of a request to it."""
    chunk = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(num_chunks):
            await send(chunk)
        await send({"type": "http.response.body"})

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1"), (b"authorization", b"Bearer sk-0"), (b"content-length", b"2")],
    }
    if options is None:
        return app, scope
    config = ServerConfig(**options)
    state = ServerState(config, ("tiny",))
    made: Any = app
    for each in reversed(guards(config, state.quotas)):
        made = each.cls(made, *each.args, **each.kwargs)
    return made, scope | {"app": SimpleNamespace(state=SimpleNamespace(server=state))}


async def cost_s(options: dict[str, Any] | None, num_requests: int, num_chunks: int) -> float:
    """Of all requests together."""
    app, scope = guarded(options, num_chunks)
    statuses = set()

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        if "status" in message:
            statuses.add(message["status"])

    begun = time.process_time()
    for _ in range(num_requests):
        await app(dict(scope), receive, send)
    took = time.process_time() - begun
    assert statuses == {200}, statuses
    return took


def main() -> None:
    """The best of five, since the machine has other work too."""
    bare_s = bare_chunk_s = 0.0
    for name, options in CASES.items():
        request_s = min(asyncio.run(cost_s(options, NUM_REQUESTS, 0)) for _ in range(5)) / NUM_REQUESTS
        chunk_s = min(asyncio.run(cost_s(options, 1, NUM_CHUNKS)) for _ in range(5)) / NUM_CHUNKS
        if options is None:
            bare_s, bare_chunk_s = request_s, chunk_s
        print(f"{name:<20}{(request_s - bare_s) * 1e6:8.1f} us{(chunk_s - bare_chunk_s) * 1e9:8.0f} ns")


if __name__ == "__main__":
    main()
