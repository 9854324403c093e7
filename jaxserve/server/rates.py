"""Rates from counters that only grow, over the last seconds."""

from collections import deque
from collections.abc import Mapping


class Rates:
    """Readings of counters, as far back as the window goes. Whoever asks brings a reading along."""

    def __init__(self, window_s: float = 5.0):
        self.window_s = window_s
        self._readings: deque[tuple[float, Mapping[str, float]]] = deque()

    def read(self, counters: Mapping[str, float], now_s: float) -> dict[str, float | None]:
        """By name, per second since the oldest reading of the window; None while there is none but this one."""
        readings = self._readings
        while readings and readings[0][0] < now_s - self.window_s:
            readings.popleft()
        if readings and readings[-1][0] >= now_s:  # two who ask at the same instant
            then_s, before = readings[0]
        else:
            readings.append((now_s, dict(counters)))
            then_s, before = readings[0]
        passed_s = now_s - then_s
        return {name: (value - before[name]) / passed_s if passed_s > 0 else None for name, value in counters.items()}
