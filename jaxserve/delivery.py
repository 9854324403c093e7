"""Delivery: the way of events from the engine's thread to the event loops of those who wait for them.

What a piece costs an event loop hardly depends on the number of tokens in it, so each stream says at what pace it wants
them (`stream.Pace`). What is held back waits here, on the engine's thread, where it costs next to nothing.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple
from weakref import WeakKeyDictionary

from jaxserve.errors import JaxserveError
from jaxserve.output import Event
from jaxserve.stream import WHOLE, Stream

# Pieces a second, of all streams together, beyond which streams begin to wait for a second token: a piece takes a server's
# event loop 30 to 40 us, so this is less than a twentieth of its time.
_PIECES_PER_S = 1000
_MOST = 16  # streams that are woken in one round of an event loop: hundreds may have news, or end, in one step


class _Parcel(NamedTuple):
    stream: Stream
    events: list[Event]
    is_last: bool
    failure: JaxserveError | None = None


class Delivery:
    """Used by the engine's thread only."""

    def __init__(self, on_lost: Callable[[asyncio.AbstractEventLoop], None]):
        """`on_lost` is told of an event loop that was closed: nobody listens there any more."""
        self._on_lost = on_lost
        self._held: dict[Stream, list[Event]] = {}
        self._sent_s: dict[Stream, float] = {}  # when something was sent last; of streams that have begun
        self._mailboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = WeakKeyDictionary()

    def send(self, events: Iterable[tuple[Stream, Event]], ended: Collection[Stream], now_s: float) -> None:
        """Send what is due of these events and of those held back; all of the streams that have `ended`."""
        for stream, event in events:
            self._held.setdefault(stream, []).append(event)
        gap_s = self._gap_s()
        due = [stream for stream in self._held if stream in ended or self._is_due(stream, now_s, gap_s)]
        self._sent_s.update(dict.fromkeys(due, now_s))
        self._post([_Parcel(stream, self._held.pop(stream), stream in ended) for stream in due])
        self._forget(ended)

    def fail(self, failures: dict[Stream, JaxserveError]) -> None:
        """These streams have ended, and this is why. What is held back of them goes first."""
        self._post([_Parcel(s, self._held.pop(s, []), True, failure) for s, failure in failures.items()])
        self._forget(failures)

    def _is_due(self, stream: Stream, now_s: float, gap_s: float) -> bool:
        sent_s, pace = self._sent_s.get(stream), stream.pace
        if sent_s is None:
            return True  # nothing is worth more than the first token
        return len(self._held[stream]) >= pace.num_events and now_s - sent_s >= min(pace.delay_s, gap_s)

    def _gap_s(self) -> float:
        """Time between two pieces of a stream if all of them are to have their share."""
        return sum(stream.pace is not WHOLE for stream in self._held) / _PIECES_PER_S

    def _post(self, parcels: Iterable[_Parcel]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[_Parcel]] = {}
        for parcel in parcels:
            by_loop.setdefault(parcel.stream.loop, []).append(parcel)
        for loop, some in by_loop.items():
            mailbox = self._mailboxes.setdefault(loop, _Mailbox())
            mailbox.parcels += some
            try:
                loop.call_soon_threadsafe(mailbox.open)
            except RuntimeError:  # it was closed while its requests were under way
                self._forget([stream for stream in self._sent_s if stream.loop is loop])
                self._on_lost(loop)

    def _forget(self, streams: Iterable[Stream]) -> None:
        for stream in streams:
            self._held.pop(stream, None)
            self._sent_s.pop(stream, None)


class _Mailbox:
    """Parcels for one event loop, handed out there a few at each of its rounds, in their order."""

    def __init__(self) -> None:
        self.parcels: deque[_Parcel] = deque()
        self._is_open = False

    def open(self) -> None:
        """Begin to hand out, on the event loop."""
        if not self._is_open:
            self._hand_out()

    def _hand_out(self) -> None:
        self._is_open = False
        for _ in range(min(_MOST, len(self.parcels))):
            stream, events, is_last, failure = self.parcels.popleft()
            if events:
                stream.push(events, is_last=is_last and failure is None)
            if failure is not None:
                stream.fail(failure)
        if self.parcels:
            self._is_open = True
            asyncio.get_running_loop().call_soon(self._hand_out)
