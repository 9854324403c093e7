"""What a policy remembers of each program: a row that calls join and leave, and that is forgotten in time.

A program is what its caller says it is (`Request.program`); a request without one is a program of its own. Names come
from outside: who splits work over many programs is not seen here (see the fair policies for that).
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from jaxserve.request import Request

Row = TypeVar("Row")
_Key = tuple[str, str]  # program and, if there is none, the request


class _Entry(Generic[Row]):
    __slots__ = ("idle_s", "is_over", "num_calls", "row")

    def __init__(self, row: Row):
        self.row = row
        self.num_calls = 0
        self.idle_s = 0.0  # since when it has had no call
        self.is_over = False  # no more calls will come


class Programs(Generic[Row]):
    """Rows of live programs. A row goes when its program was ended, or has had no call for `ttl_s` seconds."""

    def __init__(self, make: Callable[[float], Row], ttl_s: float, *, forget: Callable[[Row], None] | None = None):
        """`make`: a row, from the time of the first call. `forget`: what is done with a row that goes."""
        self._make = make
        self._ttl_s = ttl_s
        self._forget = forget
        self._entries: dict[_Key, _Entry[Row]] = {}
        self._idle: OrderedDict[_Key, None] = OrderedDict()  # longest idle first

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def rows(self) -> list[Row]:
        """All rows, oldest first."""
        return [entry.row for entry in self._entries.values()]

    def join(self, request: Request, now_s: float) -> Row:
        """A call begins. With `n` answers a request is so many calls."""
        key = _key(request)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(self._make(now_s))
        entry.num_calls += 1
        self._idle.pop(key, None)
        return entry.row

    def row_of(self, request: Request) -> Row:
        """The row of a live call."""
        return self._entries[_key(request)].row

    def leave(self, request: Request, now_s: float) -> None:
        """A call has ended. What the row should keep of it must be in it by now."""
        key = _key(request)
        entry = self._entries[key]
        entry.num_calls -= 1
        if entry.num_calls:
            return
        entry.idle_s = now_s
        self._idle[key] = None
        if entry.is_over or not request.program:
            self._drop(key)

    def end(self, program: str) -> None:
        """No more calls will come: the row goes with the last of those there are."""
        key = program, ""
        if key in self._idle:
            self._drop(key)
        elif key in self._entries:
            self._entries[key].is_over = True

    def sweep(self, now_s: float) -> None:
        """Forget programs that have been idle for too long."""
        while self._idle:
            key = next(iter(self._idle))
            if now_s - self._entries[key].idle_s < self._ttl_s:
                return
            self._drop(key)

    def _drop(self, key: _Key) -> None:
        del self._idle[key]
        row = self._entries.pop(key).row
        if self._forget is not None:
            self._forget(row)


def _key(request: Request) -> _Key:
    return (request.program, "") if request.program else ("", request.request_id)
