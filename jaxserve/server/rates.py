"""Rates from counters that only grow, over the last seconds."""

from collections import deque
from collections.abc import Mapping


class Rates:
    """Readings of counters, as far back as the window goes. Whoever asks brings a reading along."""

    def __init__(self, window_s: float = 5.0):
        self.window_s = window_s
        self._readings: deque[tuple[float, Mapping[str, float]]] = deque()

    @property
    def num_readings(self) -> int:
        """That are kept: at most about a hundred, however many ask, and how often."""
        return len(self._readings)

    def read(self, counters: Mapping[str, float], now_s: float) -> dict[str, float | None]:
        """By name, per second since the oldest reading of the window; None while there is none but this one."""
        readings = self._readings
        while readings and readings[0][0] < now_s - self.window_s:
            readings.popleft()
        if not readings or now_s - readings[-1][0] >= self.window_s / 100:
            readings.append((now_s, dict(counters)))
        then_s, before = readings[0]
        passed_s = now_s - then_s
        return {name: (value - before[name]) / passed_s if passed_s > 0 else None for name, value in counters.items()}
