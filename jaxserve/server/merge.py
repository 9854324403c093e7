"""The events of several streams as they come."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from jaxserve.errors import DeviceError
from jaxserve.output import Event
from jaxserve.stream import Stream


async def merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, list[Event]]]:
    """(number of the stream, its news); leaving early ends the requests.

    Raises:
      DeviceError: a step failed, and with it a request.
      UnavailableError: the engine has failed.
    """
    try:
        if len(streams) == 1:  # nearly always
            while events := await streams[0].take():
                yield 0, _good(events)
            return
        queue: asyncio.Queue[tuple[int, list[Event] | BaseException]] = asyncio.Queue(maxsize=len(streams))
        tasks = [asyncio.ensure_future(_forward(number, stream, queue)) for number, stream in enumerate(streams)]
        try:
            num_left = len(streams)
            while num_left:
                number, news = await queue.get()
                if isinstance(news, BaseException):
                    raise news
                if news:
                    yield number, _good(news)
                else:
                    num_left -= 1
        finally:
            for task in tasks:
                task.cancel()
    finally:
        for stream in streams:
            stream.abort()


async def _forward(number: int, stream: Stream, queue: asyncio.Queue[tuple[int, list[Event] | BaseException]]) -> None:
    try:
        while events := await stream.take():
            await queue.put((number, events))
        await queue.put((number, []))
    except Exception as error:  # noqa: BLE001  it is raised where the events are read
        await queue.put((number, error))


def _good(events: list[Event]) -> list[Event]:
    if events[-1].output.error:
        raise DeviceError(events[-1].output.error)
    return events
