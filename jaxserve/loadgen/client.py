"""A client of OpenAI's streaming endpoints that writes down when tokens came."""

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.errors import ServerError
from jaxserve.loadgen.http import BrokenReply, Host
from jaxserve.loadgen.sse import Events

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_MOST_ERROR = 65_536  # bytes of a refusal that are kept


@dataclasses.dataclass(slots=True)
class Answer:
    """What came of one request. Times are seconds of the client's clock.

    A chunk counts as one arrival, however many tokens it holds: a client sees no more. What the server says about the
    number of tokens (`usage`) goes before the number of chunks.
    """

    sent_s: float
    queued_s: float = 0.0  # from when it was due until it was sent
    num_prompt: int = 0
    num_output: int = 0
    num_chunks: int = 0
    has_usage: bool = False
    first_s: float | None = None
    last_s: float = 0.0  # when the answer was whole
    gaps: list[float] = dataclasses.field(default_factory=list)  # between chunks with text
    texts: list[str] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: str = ""  # its kind, such as "HTTP 429"; empty: none
    error_text: str = ""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token, or to the end of an answer without any."""
        return (self.last_s if self.first_s is None else self.first_s) - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None where there is no second one."""
        if self.first_s is None or self.num_output < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_output - 1)

    @property
    def e2e_s(self) -> float:
        """Seconds from sending to the end of the answer."""
        return self.last_s - self.sent_s


class Client:
    """Sends requests to one server. `count` counts the tokens of a text, where a server does not say how many it wrote."""

    def __init__(
        self,
        host: Host,
        *,
        headers: Mapping[str, str],
        timeout_s: float,
        clock: Callable[[], float] = time.perf_counter,
        count: Callable[[str], int] | None = None,
    ):
        self.clock, self.url = clock, host.url
        self._host, self._timeout_s, self._count = host, timeout_s, count
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream", **headers}

    async def ask(self, path: str, body: bytes, queued_s: float = 0.0) -> Answer:
        """Send one request. What goes wrong stands in the answer; only cancellation is raised."""
        reader = _Reader(Answer(self.clock(), queued_s), self.clock)
        answer = reader.answer
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._host.exchange("POST", path, self._headers, body, reader)
            reader.end()
        except TimeoutError:
            reader.fail("timeout", f"no end after {self._timeout_s:g} s")
        except BrokenReply as error:
            if not reader.is_done:
                reader.fail("connection broke", str(error))
        except OSError as error:
            reader.fail("no connection", _reason(error))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            reader.fail("not OpenAI's protocol", f"{type(error).__name__}: {error}")
        answer.last_s = answer.last_s or self.clock()
        if not answer.has_usage:
            answer.num_output = self._count(answer.text) if self._count else answer.num_chunks
        return answer

    async def close(self) -> None:
        """Close all connections."""
        await self._host.close()

    async def models(self) -> list[str]:
        """Names of the models that the server has.

        Raises:
          ServerError: it does not answer, or refuses.
        """
        reply = _Reply()
        try:
            async with asyncio.timeout(min(self._timeout_s, 30)):
                await self._host.exchange("GET", "/v1/models", self._headers, b"", reply)
        except (OSError, BrokenReply) as error:
            raise ServerError(f"no server answers at {self.url} ({_reason(error)})") from None
        if reply.status != 200:
            raise ServerError(f"{self.url} refuses: HTTP {reply.status}, {_message(reply.data)}")
        try:
            return [str(model["id"]) for model in json.loads(reply.data)["data"]]
        except (ValueError, TypeError, KeyError):
            raise ServerError(
                f"{self.url} has no list of models as OpenAI's protocol has it", remedy="Give --model"
            ) from None


class _Reply:
    """A short reply as a whole."""

    def __init__(self) -> None:
        self.status, self.data = 0, b""

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status

    def part(self, data: bytes) -> None:
        self.data = (self.data + data)[:_MOST_ERROR]


class _Reader:
    """Takes a streamed reply and fills an `Answer`."""

    def __init__(self, answer: Answer, clock: Callable[[], float]):
        self.answer = answer
        self._clock = clock
        self._events = Events()
        self._refusal = b""
        self._status = 0
        self.is_done = False
        self._chunk_s = 0.0

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self._status = status
        kind = headers.get("content-type", "")
        if status == 200 and not kind.startswith("text/event-stream"):
            raise ValueError(f"the answer is no stream of events but {kind or 'of no type'}")

    def part(self, data: bytes) -> None:
        if self._status != 200:
            self._refusal = (self._refusal + data)[:_MOST_ERROR]
            return
        now_s = self._clock()
        for event in self._events.feed(data):
            self._event(event, now_s)

    def end(self) -> None:
        if self._status != 200:
            return self.fail(f"HTTP {self._status}", _message(self._refusal))
        for event in self._events.rest():
            self._event(event, self._clock())
        if not self.is_done and not self.answer.finish_reason and not self.answer.error:
            self.fail("cut off", "the stream ended before the answer did")
        return None

    def fail(self, kind: str, text: str) -> None:
        if not self.answer.error:  # the first one is the cause
            self.answer.error, self.answer.error_text = kind, text

    def _event(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self.is_done = True
            return None
        chunk, answer = json.loads(data), self.answer
        if chunk.get("error"):
            return self.fail("error in the stream", _message(data))
        if usage := chunk.get("usage"):
            answer.has_usage = True
            answer.num_prompt, answer.num_output = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        for choice in chunk.get("choices") or ():
            reason = choice.get("finish_reason")
            text = choice.get("text")
            if text is None:
                delta = choice.get("delta") or {}
                text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
                is_token = bool(text or delta.get("tool_calls"))  # the first delta has only a role
            else:
                is_token = bool(text) or not reason  # a token inside of a character has no text
            if is_token:
                answer.num_chunks += 1
                answer.texts.append(text)
                if answer.first_s is None:
                    answer.first_s = now_s
                else:
                    answer.gaps.append(now_s - self._chunk_s)
                self._chunk_s = now_s
            if is_token or reason:
                answer.last_s = now_s
            if reason:
                answer.finish_reason = reason
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionError) and error.errno:
        return os.strerror(error.errno)  # asyncio's own text names only the address
    return str(getattr(error, "strerror", "") or error) or "no reply"


def _message(body: bytes) -> str:
    """What a refusal says, in one line."""
    try:
        value: Any = json.loads(body)
        for key in ("error", "message", "detail"):
            if isinstance(value, dict) and value.get(key):
                value = value[key]
        text = value if isinstance(value, str) else json.dumps(value)
    except ValueError:
        text = body.decode("utf-8", "replace")
    return " ".join(text.split())[:300]
