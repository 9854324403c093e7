"""A connection between two processes of one engine, and what they say on it.

Messages are pickled, but no peer can make us run code: of classes, only those of `_CLASSES` are read.
"""

import contextlib
import dataclasses
import io
import os
import pickle
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.request import SamplingParams, Task
from jaxserve.step import BlockCopy, BlockSwap, Row, Seat, SlotStart, StepPlan

_EXIT_FAILED = 1
_FLUSH_S = 2.0  # for others to be told, and for what was printed to be written, before a process ends
# A host that lost its power or network closes nothing: it is asked after 5 quiet seconds, and given up 6 later.
_KEEP_ALIVE = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 11_000}


@dataclasses.dataclass(frozen=True, slots=True)
class Hello:
    """Follower, first: who it is. `versions` must be those of the leader."""

    process_id: int
    host: str
    versions: str


@dataclasses.dataclass(frozen=True, slots=True)
class LoadModel:
    """Leader: load your part of a model. `config` says all sizes."""

    engine: int
    model: str
    config: EngineConfig


@dataclasses.dataclass(frozen=True, slots=True)
class Ready:
    """Follower: the model is loaded and compiled."""

    engine: int


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """Follower: the model cannot be loaded here."""

    engine: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class RunStep:
    """Leader: dispatch this."""

    engine: int
    plan: StepPlan


@dataclasses.dataclass(frozen=True, slots=True)
class DropModel:
    """Leader: an engine is no longer used."""

    engine: int


@dataclasses.dataclass(frozen=True, slots=True)
class Leave:
    """Leader: the program is done."""


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
    """Either: it cannot go on, and the other must not wait for it."""

    reason: str


_ending = threading.Lock()
Message = Hello | LoadModel | Ready | Refused | RunStep | DropModel | Leave | Failed
_CLASSES: dict[tuple[str, str], type] = {
    (cls.__module__, cls.__name__): cls
    for cls in (
        *(Hello, LoadModel, Ready, Refused, RunStep, DropModel, Leave, Failed),
        *(EngineConfig, StepPlan, Row, Seat, BlockCopy, BlockSwap, SlotStart, SamplingParams, Task),
        *(bool, int, float),
    )
}


class Line:
    """One end of a connection. Any thread may send, one may receive. `name` is that of the other process.

    Both raise OSError or EOFError when the other side has gone.
    """

    def __init__(self, connection: Connection, name: str):
        self.name = name
        self._connection = connection
        self._lock = threading.Lock()
        _set_options(connection.fileno())

    def send(self, message: Message) -> None:
        """Send, and wait while the other side has too much to read."""
        content = encode(message)
        with self._lock:
            self._connection.send_bytes(content)

    def receive(self) -> Message:
        """Wait for the next message. Raises pickle.UnpicklingError for anything else."""
        return decode(self._connection.recv_bytes())

    def close(self) -> None:
        """Tell the other side that nothing follows."""
        self._connection.close()


def encode(message: Message) -> bytes:
    """A message as bytes; numbers of NumPy become Python's."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(message)
    return buffer.getvalue()


def decode(content: bytes) -> Message:
    """Raises pickle.UnpicklingError for what is no message."""
    message = _Unpickler(io.BytesIO(content)).load()
    if not isinstance(message, Message):
        raise pickle.UnpicklingError(f"{type(message).__name__} is no message")
    return message


def end_process(reason: str, tell_others: Callable[[], None] = lambda: None) -> NoReturn:
    """Print a sentence and end this process, even while another thread waits for a device: only `os._exit` can."""
    if not _ending.acquire(blocking=False):  # another thread does, and has the first reason
        threading.Event().wait()
    print(f"jaxserve: {reason}", file=sys.stderr, flush=True)  # noqa: T201
    with contextlib.suppress(Exception):
        threading.Timer(_FLUSH_S, os._exit, [_EXIT_FAILED]).start()  # what follows may have to wait
        tell_others()
        sys.stdout.flush()
    os._exit(_EXIT_FAILED)


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return (type(value.item()), (value.item(),)) if isinstance(value, np.generic) else NotImplemented


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> type:
        try:
            return _CLASSES[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is no part of a message") from None


def _set_options(file: int) -> None:
    with socket.socket(fileno=os.dup(file)) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a plan must not wait to be sent with the next one
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # TCP's are Linux's
                level = socket.SOL_SOCKET if name.startswith("SO") else socket.IPPROTO_TCP
                line.setsockopt(level, getattr(socket, name), value)
