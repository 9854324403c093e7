"""A load test: requests are sent when they are due, and what came of them is collected."""

import asyncio
import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.errors import ServerError
from jaxserve.loadgen.client import CHAT, Answer, Client
from jaxserve.loadgen.dataset import body_of
from jaxserve.loadgen.prompts import Prompts
from jaxserve.workload.call import Call, Workload

Watcher = Callable[[Answer], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is sent. `shared`: fields of every body. `with_meta`: send client, program, priority and deadline of a call."""

    workload: Workload
    prompts: Prompts
    endpoint: str
    shared: Mapping[str, Any]
    with_meta: bool = False
    max_concurrency: int | None = None


@dataclasses.dataclass(slots=True)
class Result:
    """What came of it: answers in the order of the calls, of those that were sent and ended. Seconds."""

    answers: dict[str, Answer]
    num_calls: int
    start_s: float = 0.0
    end_s: float = 0.0
    cpu_s: float = 0.0  # that this process took
    is_partial: bool = False  # interrupted
    num_unsent: int = 0  # because a call that they wait for failed

    @property
    def duration_s(self) -> float:
        """From the start until the last answer."""
        return self.end_s - self.start_s


async def check(client: Client, load: Load) -> None:
    """Send one short request, so that a mistake is told before a thousand requests make it.

    Raises:
      ServerError: no server, or it refuses such requests.
    """
    prompt = "the" if load.endpoint.endswith("/chat/completions") else " the"
    call = Call(call_id="check", prompt=(), output_tokens=1)
    answer = await client.ask(load.endpoint, _body(load, call, prompt))
    if answer.error:
        if answer.error in ("no connection", "connection broke", "timeout"):
            raise ServerError(f"no server answers at {client.url} ({answer.error_text})")
        raise ServerError(
            f"{client.url}{load.endpoint} refuses: {answer.error}, {answer.error_text or 'no reason given'}"
        )


async def run_load(client: Client, load: Load, watch: Watcher | None = None) -> Result:
    """Send all calls, each when it is due and those before it have ended. Ctrl-C ends it with what there is so far."""
    run = _Run(client, load, watch)
    task = asyncio.ensure_future(run.all())
    loop = asyncio.get_running_loop()

    def stop() -> None:
        run.result.is_partial = True
        task.cancel()

    with contextlib.suppress(
        NotImplementedError, RuntimeError, ValueError
    ):  # not this platform, or not the main thread
        loop.add_signal_handler(signal.SIGINT, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not run.result.is_partial:  # somebody else wants us to end
            raise
    finally:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGINT)
    return run.done()


class _Run:
    def __init__(self, client: Client, load: Load, watch: Watcher | None):
        self._client, self._load, self._watch = client, load, watch
        calls = load.workload.calls
        self._calls = {call.call_id: call for call in calls}
        self._ended = {parent: asyncio.Event() for call in calls for parent in call.parents}
        self._places = asyncio.Semaphore(load.max_concurrency or len(calls))
        self._texts = dict[str, str]()  # of answers that others wait for
        # Made before the clock runs; those that need answers are made when these are there.
        self._bodies = {call.call_id: self._make(call) for call in calls if not call.wanted}
        self.result = Result({}, len(calls), client.clock(), cpu_s=time.process_time())

    async def all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for call in self._load.workload.calls:
                if not call.parents:
                    await self._wait_until(self.result.start_s + call.arrival_s)
                group.create_task(self._one(call))

    def done(self) -> Result:
        result = self.result
        result.end_s = max((answer.last_s for answer in result.answers.values()), default=self._client.clock())
        result.cpu_s = time.process_time() - result.cpu_s
        result.answers = {name: result.answers[name] for name in self._calls if name in result.answers}
        return result

    async def _one(self, call: Call) -> None:
        for parent in call.parents:
            await self._ended[parent].wait()
        if any(parent not in self._texts for parent in call.parents):
            self.result.num_unsent += 1
            self._end(call)
            return
        now_s = self._client.clock()
        due_s = self.result.start_s + call.arrival_s
        if call.parents:
            due_s = max(due_s, now_s + call.think_s)
            await self._wait_until(due_s)
        async with self._places:
            body = self._bodies.pop(call.call_id, None) or self._make(call)
            answer = await self._client.ask(self._load.endpoint, body, self._client.clock() - due_s)
        if not answer.has_usage:
            answer.num_prompt = sum(getattr(piece, "length", 0) for piece in call.prompt)
        self.result.answers[call.call_id] = answer
        if call.call_id in self._ended and not answer.error:
            self._texts[call.call_id] = answer.text
        self._end(call)
        if self._watch is not None:
            self._watch(answer)

    def _end(self, call: Call) -> None:
        if call.call_id in self._ended:
            self._ended[call.call_id].set()

    def _make(self, call: Call) -> bytes:
        return _body(self._load, call, self._load.prompts.of(call, self._calls, self._texts))

    async def _wait_until(self, due_s: float) -> None:
        left_s = due_s - self._client.clock()
        if left_s > 0:
            await asyncio.sleep(left_s)


def _body(load: Load, call: Call, prompt: Any) -> bytes:
    is_chat = load.endpoint.endswith(CHAT.removeprefix("/v1"))
    return body_of(call, prompt, is_chat=is_chat, shared=dict(load.shared), with_meta=load.with_meta)
