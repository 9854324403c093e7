"""A roofline of a dense 8B model (R0 of the cost-model notes), until `jaxserve.cost` is here."""

from typing import NamedTuple


class Work(NamedTuple):
    tokens: int  # padded
    rows: int
    pairs: int  # (query, key) pairs
    context: int  # keys and values read, in tokens


class CostModel:
    def __init__(self, flops: float = 0.6 * 989e12, bandwidth: float = 0.8 * 3.35e12, host_s: float = 0.003):
        self._flops, self._bandwidth, self.host_s = flops, bandwidth, host_s

    def step_s(self, work: Work) -> float:
        """Seconds on the device."""
        flops = 16e9 * work.tokens + 524_288 * work.pairs
        return max(flops / self._flops, (16e9 + 131_072 * work.context) / self._bandwidth)
