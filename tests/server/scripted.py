"""An engine that says what it is told to: for what the bundled model would never write."""

import asyncio
from collections.abc import Sequence
from typing import Any

from jaxserve.errors import DeviceError
from jaxserve.intake import Intake
from jaxserve.output import CompletionOutput, Event, RequestMetrics, RequestOutput
from jaxserve.request import Request
from jaxserve.stream import Stream
from jaxserve.tokenizer import Tokenizer


class ScriptedEngine:
    """In the place of an AsyncEngine. Each text of the script is one event, of one token."""

    failure = ""
    num_unfinished = 0

    def __init__(self, tokenizer: Tokenizer):
        self.script: Sequence[str] = ()
        self.finish_reason = "stop"
        self.error: str | None = None  # of the last event
        self.requests: list[Request] = []
        self.intake = Intake(tokenizer, (), lambda request: None, vocab_size=1024)
        self.listeners: list[Any] = []

    async def prepare(self, work: Any, *args: Any, **options: Any) -> Any:
        """See AsyncEngine."""
        return await asyncio.to_thread(work, *args, **options)

    def start(self, request: Request, text: str | None = None) -> Stream:
        """See AsyncEngine."""
        self.requests.append(request)
        stream = Stream(request, asyncio.get_running_loop(), lambda request_id, index: None)
        output = RequestOutput(request.request_id, text, list(request.prompt_token_ids), [], RequestMetrics(0.0))
        output.outputs.append(CompletionOutput(0))
        asyncio.ensure_future(self._speak(stream, output))  # noqa: RUF006  it outlives nobody
        return stream

    async def finish(self, stream: Stream) -> RequestOutput:
        """See AsyncEngine."""
        while await stream.take():
            pass
        assert stream.output is not None
        if stream.output.error:
            raise DeviceError(stream.output.error)
        return stream.output

    async def _speak(self, stream: Stream, output: RequestOutput) -> None:
        answer = output.outputs[0]
        for number, text in enumerate(self.script, 1):
            await asyncio.sleep(0)
            answer.text += text
            answer.token_ids.append(number)
            output.finished = number == len(self.script)
            output.error = self.error if output.finished else None
            answer.finish_reason = self.finish_reason if output.finished else None
            stream.push(
                [Event(stream.request_id, 0, text, (number,), answer.finish_reason, output)], is_last=output.finished
            )
