"""Time as an argument: the engine's wall clock, and a virtual one for tests and simulation."""

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since an arbitrary start; never goes back."""

    def now_s(self) -> float:
        """The current time in seconds."""
        ...


class WallClock:
    """`time.perf_counter`."""

    def now_s(self) -> float:
        """Seconds of `time.perf_counter`."""
        return time.perf_counter()


class VirtualClock:
    """Advances only when told to."""

    def __init__(self, start_s: float = 0.0):
        self._now_s = start_s

    def now_s(self) -> float:
        """Seconds so far."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now_s += seconds
