"""Histogram: how often a value fell into each bucket."""

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Prometheus' kind: `bounds` are the upper ends of buckets, and one more bucket takes what is above all of them.

    One thread adds; any may read.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # of each bucket by itself
        self.total = 0.0  # sum of all values

    @property
    def num_values(self) -> int:
        """How many values were added."""
        return sum(self.counts)

    def add(self, value: float, times: int = 1) -> None:
        """Count a value, as if it had come so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


def one_two_five(largest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `largest`: vLLM's buckets for numbers of tokens."""
    scales = [10**exponent for exponent in range(len(str(largest)))]
    return tuple(float(step * scale) for scale in scales for step in (1, 2, 5) if step * scale <= largest)
