"""Random numbers of workloads: times between arrivals, and lengths in tokens. Everything comes from one seeded
generator."""

import itertools
import math
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from jaxserve.errors import ConfigError


class Lognormal(NamedTuple):
    """Lengths around a median, with a long tail."""

    median: float
    sigma: float  # of the logarithm
    least: int = 1
    most: int = 32_768

    def draw(self, rng: Random) -> int:
        """One length in tokens."""
        return min(max(round(self.median * math.exp(rng.gauss(0.0, self.sigma))), self.least), self.most)


class Even(NamedTuple):
    """Lengths from a range, all equally likely."""

    least: int
    most: int

    def draw(self, rng: Random) -> int:
        """One length in tokens."""
        return rng.randint(self.least, self.most)


class Pareto(NamedTuple):
    """Lengths with a tail so heavy that few long ones make most of the tokens."""

    alpha: float
    least: int
    most: int

    def draw(self, rng: Random) -> int:
        """One length in tokens."""
        return min(round(self.least * rng.paretovariate(self.alpha)), self.most)


Lengths = Lognormal | Even | Pareto


def arrivals(rng: Random, count: int, rate: float, cv: float = 1.0) -> list[float]:
    """Times of so many arrivals, `rate` per second, from 0 on.

    `cv`: deviation of the times between them over their mean. 1: a Poisson process; more: bursts (gamma); 0: a metronome.
    An infinite rate: all at once.

    Raises:
      ConfigError: a rate or a deviation that is negative or no number.
    """
    if not rate > 0:
        raise ConfigError(f"rate={rate!r:.40} must be a positive number of arrivals per second")
    if not (cv >= 0 and math.isfinite(cv)):
        raise ConfigError(f"cv={cv!r:.40} must be a number, 0 or more")
    if math.isinf(rate):
        return [0.0] * count
    shape = 1 / cv**2 if cv else math.inf
    gaps = [rng.gammavariate(shape, 1 / (shape * rate)) if cv else 1 / rate for _ in range(count - 1)]
    return [0.0, *itertools.accumulate(gaps)] if count else []


def new_tokens() -> Callable[[], int]:
    """A source of token ids that no text has had yet."""
    return itertools.count(1).__next__
