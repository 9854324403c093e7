"""The events of several streams as they come, several of one answer as one."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from jaxserve.errors import DeviceError
from jaxserve.output import Event
from jaxserve.stream import Pace, Stream


async def merged(streams: Sequence[Stream], pace: Pace) -> AsyncIterator[tuple[int, list[Event]]]:
    """(number of the stream, its news, one event for each of its answers). Who leaves early ends the requests.

    `pace` of each answer: a request of several has as many times the events.

    Raises:
      DeviceError: a step failed, and with it a request.
      UnavailableError: the engine has failed.
    """
    for stream in streams:
        stream.pace = pace._replace(num_events=pace.num_events * stream.request.params.n)
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
    return events if len(events) == 1 else joined(events)


def joined(events: Sequence[Event]) -> list[Event]:
    """What came of each answer since the last time as one event."""
    by_index: dict[int, list[Event]] = {}
    for event in events:
        by_index.setdefault(event.index, []).append(event)
    return [_one(parts) if len(parts) > 1 else parts[0] for parts in by_index.values()]


def _one(parts: Sequence[Event]) -> Event:
    last, ids = parts[-1], list[int]()
    for part in parts:
        ids += part.token_ids
    text = "".join([part.text for part in parts])
    return Event(last.request_id, last.index, text, tuple(ids), last.finish_reason, last.output)
