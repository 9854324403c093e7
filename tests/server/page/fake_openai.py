"""A pretend server for the page: OpenAI's routes over a script, so that odd cases come when a test asks for them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from jaxserve.openai.envelope import DONE, frame
from jaxserve.openai.errors import ApiError
from jaxserve.server.json import JsonResponse
from jaxserve.server.routes import page
from jaxserve.server.sse import EventStream

HTML = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script><b>bold</b>"
CODE = "Two lines:\n\n```python\nif a < b:\n    print(`a`)\n```\n\nThat is all."
REFUSAL = "max_tokens=0 must be a whole number of at least 1. Raise it, or leave it out."
FAILURE = "The device lost a step. Send it again."

# The last message says what happens. All else is echoed.
_SCRIPTS: dict[str, tuple[str, int, float]] = {  # text, characters of a piece, seconds between two
    "slow": ("word " * 20_000, 5, 0.005),
    "html": (HTML, 7, 0.001),
    "code": (CODE, 3, 0.001),
    "wide": ("x" * 400 + "\n```\n" + "a_very_long_name_" * 30 + "\n```\n", 90, 0.001),
    "broken": ("Half of", 3, 0.001),  # then an error object in the stream
    "cut": ("Half of", 3, 0.001),  # then the stream ends as if the server had gone
    "think": ("So it is.", 3, 0.001),  # after a thought
    "refused": ("", 1, 0),  # with status 400
}


class FakeOpenAI:
    """The app, what it was asked, and what it says of itself."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.num_left = 0  # streams that had not ended when their reader went
        self.num_stats = 0
        self.key = ""
        self.rows: list[dict[str, Any]] = []
        self.app = FastAPI()
        self.app.include_router(page.router)
        self.app.get("/v1/models")(self._models)
        self.app.get("/stats")(self._stats)
        self.app.post("/v1/chat/completions")(self._chat)
        self.app.post("/v1/completions")(self._completion)
        self.app.add_exception_handler(ApiError, _tell)

    def _check(self, request: Request) -> None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            raise ApiError("The API key is missing or wrong.", status=401)

    async def _models(self, request: Request) -> Response:
        self._check(request)
        return JsonResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in ("toy", "base")]})

    async def _stats(self, request: Request) -> Response:
        self._check(request)
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
        return JsonResponse(figures)

    async def _chat(self, request: Request) -> Response:
        self._check(request)
        body = await self._note(request)
        if body["model"] == "base":
            raise ApiError("this model has no chat template. Use /v1/completions")
        return self._answer(body["messages"][-1]["content"], lambda text: {"delta": {"content": text}})

    async def _completion(self, request: Request) -> Response:
        self._check(request)
        return self._answer((await self._note(request))["prompt"], lambda text: {"text": text})

    async def _note(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        self.bodies.append(body)
        return body

    def _answer(self, said: str, choice: Callable[[str], dict[str, Any]]) -> Response:
        if said == "refused":
            raise ApiError(REFUSAL)
        return EventStream(self._frames(said, choice), done=b"" if said == "cut" else DONE)

    async def _frames(self, said: str, choice: Callable[[str], dict[str, Any]]) -> AsyncIterator[bytes]:
        text, size, wait_s = _SCRIPTS.get(said, (f"You said: {said}", 4, 0.01))
        pieces = [text[begin : begin + size] for begin in range(0, len(text), size)]
        if said == "think":
            yield _chunk({"delta": {"reasoning_content": "Hm, "}})
            yield _chunk({"delta": {"reasoning_content": "<b>well</b>."}})
        try:
            for piece in pieces:
                yield _chunk(choice(piece))
                await asyncio.sleep(wait_s)
        except (GeneratorExit, asyncio.CancelledError):
            self.num_left += 1
            raise
        if said == "broken":
            raise ApiError(FAILURE, status=500)
        if said != "cut":
            yield _chunk(choice("") | {"finish_reason": "stop"})
            usage = {
                "prompt_tokens": 40,
                "completion_tokens": len(pieces),
                "prompt_tokens_details": {"cached_tokens": 32},
            }
            yield frame({"choices": [], "usage": usage})


def _chunk(choice: dict[str, Any]) -> bytes:
    return frame({"choices": [{"index": 0, "finish_reason": None, **choice}]})


async def _tell(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JsonResponse(error.body(), status_code=error.status)
