"""A pretend server for the page: OpenAI's routes over a script, so that odd cases come when a test asks for them.

The last message says what happens: "slow" answers for ever, "html" with mark-up, "broken" ends with an error object in the
stream, "cut" loses the connection, "refused" is a 400, "think" thinks first, "code" has a fenced block, "wide" cannot be
wrapped; all else is echoed.
"""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from jaxserve.server.routes import page

HTML = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script><b>bold</b>"
SENTENCE = "max_tokens=0 must be a whole number of at least 1. Raise it, or leave it out."


class FakeOpenAI:
    """The app, what it was asked, and what it says of itself."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.num_cancelled = 0  # streams whose reader has gone
        self.num_stats = 0
        self.key = ""
        self.rows: list[dict[str, Any]] = []
        self.app = FastAPI()
        self.app.include_router(page.router)
        self.app.get("/v1/models")(self._models)
        self.app.get("/stats")(self._stats)
        self.app.post("/v1/chat/completions")(self._chat)
        self.app.post("/v1/completions")(self._completion)

    def _refusal(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return error("The API key is missing or wrong.", 401)
        return None

    async def _models(self, request: Request) -> Response:
        models = [{"id": name, "object": "model"} for name in ("toy", "base")]
        return self._refusal(request) or JSONResponse({"object": "list", "data": models})

    async def _stats(self, request: Request) -> Response:
        self.num_stats += 1
        load = self.num_stats % 7
        figures = {
            "now_s": time.perf_counter(),
            "running": load,
            "waiting": load // 3,
            "kv_share": load / 10,
            "cached_share": 0.375,
            "window_s": 5.0,
            "output_tokens_per_s": None if self.num_stats == 1 else 100.0 * load,
            "prompt_tokens_per_s": None if self.num_stats == 1 else 20.0 * load,
            "requests": self.rows,
        }
        return self._refusal(request) or JSONResponse(figures)

    async def _chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.bodies.append(body)
        if body["model"] == "base":
            return error("this model has no chat template. Use /v1/completions", 400)
        said = body["messages"][-1]["content"]
        if said == "refused":
            return error(SENTENCE, 400)
        return self._stream(said, lambda text: {"delta": {"content": text}})

    async def _completion(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        return self._stream(body["prompt"], lambda text: {"text": text})

    def _stream(self, said: str, choice: Any) -> Response:
        return StreamingResponse(self._pieces(said, choice), media_type="text/event-stream")

    async def _pieces(self, said: str, choice: Any) -> AsyncIterator[str]:
        count = 0
        try:
            if said == "think":
                yield event({"delta": {"reasoning_content": "Hm."}})
            async for text in words(said):
                count += 1
                yield event(choice(text))
            if said == "broken":
                yield f"data: {json.dumps({'error': {'message': 'The device lost a step. Send it again.'}})}\n\n"
            if said == "cut":
                raise ConnectionResetError
            yield event({**choice(""), "finish_reason": "stop"})
            usage = {"prompt_tokens": 40, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 32}}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise


def event(choice: dict[str, Any]) -> str:
    """A piece of an answer, as server-sent event."""
    return f"data: {json.dumps({'choices': [{'index': 0, 'finish_reason': None, **choice}]})}\n\n"


def error(message: str, status: int) -> Response:
    """OpenAI's error object."""
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)


async def words(said: str) -> AsyncIterator[str]:
    """The pieces of an answer."""
    if said == "slow":
        for number in range(100_000):
            yield f"word {number} "
            await asyncio.sleep(0.02)
    elif said == "html":
        for begin in range(0, len(HTML), 7):
            yield HTML[begin : begin + 7]
    elif said == "code":
        text = "Two lines:\n\n```python\nif a < b:\n    print(`a`)\n```\n\nThat is all."
        for begin in range(0, len(text), 3):
            yield text[begin : begin + 3]
            await asyncio.sleep(0.005)
    elif said == "wide":
        yield "x" * 400 + "\n" + "a_very_long_name_" * 30
    else:
        for word in ("You", " said: ", said):
            yield word
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """Run an app in a thread of its own, at a port that the system chooses; its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end_s = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < end_s, "the server did not start"
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
