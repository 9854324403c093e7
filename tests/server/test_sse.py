"""Whoever leaves, however early, takes the requests along."""

import asyncio

import pytest

from jaxserve.request import Request
from jaxserve.server.sse import EventStream
from jaxserve.stream import Stream


@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_a_request_is_ended_when_its_answer_is_cancelled(rounds):
    aborted = list[str]()

    async def main():
        loop = asyncio.get_running_loop()
        stream = Stream(Request(request_id="r", prompt_token_ids=(1,)), loop, lambda *which: aborted.append(which[0]))

        async def frames():
            await stream.take()
            yield b""

        async def never():
            await loop.create_future()

        task = asyncio.ensure_future(EventStream(frames(), [stream])({}, never, never))
        await asyncio.sleep(0)
        for _ in range(rounds):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    assert aborted == ["r"]
