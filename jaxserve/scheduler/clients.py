"""One number for each client, such as the service it has had: what policies that share fairly keep."""

import math
from collections.abc import Mapping

from jaxserve.errors import ConfigError

_MOST_IDLE = 1_000  # names come from outside


class Clients:
    """Numbers by client's name. Of many clients without a request, those that have been so for longest are forgotten."""

    def __init__(self, weights: Mapping[str, float] | None = None):
        """`weights`: shares of service; a client that is not named has 1.

        Raises:
          ConfigError: a weight is not a positive number.
        """
        for client, weight in (weights or {}).items():
            require(f"weights[{client!r:.40}]", weight, 1e-6, 1e6)
        self.numbers: dict[str, float] = {}
        self._weights = dict(weights or {})
        self._live: dict[str, int] = {}  # sequences that wait or run
        self._idle: dict[str, None] = {}  # clients without any, longest first

    def enter(self, client: str) -> None:
        """A sequence of this client has come. A client that is not known starts with 0."""
        self.numbers.setdefault(client, 0.0)
        self._live[client] = self._live.get(client, 0) + 1
        self._idle.pop(client, None)

    def leave(self, client: str) -> None:
        """A sequence of this client has ended."""
        self._live[client] -= 1
        if self._live[client]:
            return
        del self._live[client]
        self._idle[client] = None
        if len(self._idle) > _MOST_IDLE:
            oldest = next(iter(self._idle))
            del self._idle[oldest], self.numbers[oldest]

    def add(self, client: str, amount: float) -> None:
        """Count service, positive or negative: the greater a client's weight, the less it counts."""
        self.numbers[client] += amount / self._weights.get(client, 1.0)


def require(option: str, value: object, least: float, most: float = math.inf) -> None:
    """Refuse an option that is not a number from `least` to `most`.

    Raises:
      ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        limit = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise ConfigError(f"scheduling option {option}={value!r:.40} must be a number {limit}")
