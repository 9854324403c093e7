"""What the page shows, as one object: figures of the engine, and the last requests. Never a prompt."""

from collections.abc import Mapping
from typing import Any

from jaxserve.clock import Clock, WallClock
from jaxserve.server.rates import Rates
from jaxserve.server.recent import Recent


class Stats:
    """Puts readings together. Times are of the clock of the engine, in seconds; shares are from 0 to 1."""

    def __init__(self, model: str, clock: Clock | None = None):
        self._clock = clock or WallClock()
        self._rates = Rates()
        self.recent = Recent(self._clock, model)

    def read(self, metrics: Mapping[str, Any], client: str | None = None) -> dict[str, Any]:
        """From the engine's metrics. With a client's name only requests of its own are listed; gauges are of all.

        Rates are None until there are two readings within the window; shares, until there is anything to share.
        """
        now_s = self._clock.now_s()
        computed, cached = metrics["prompt_tokens"], metrics["cached_tokens"]
        rates = self._rates.read({"output_tokens": metrics["output_tokens"], "prompt_tokens": computed}, now_s)
        num_blocks = metrics["num_kv_blocks"] * len(metrics["replica_tokens"])
        return {
            "now_s": now_s,
            "running": metrics["num_running"],
            "waiting": metrics["num_waiting"],
            "kv_share": metrics["kv_blocks_held"] / num_blocks if num_blocks else None,
            "cached_share": cached / (cached + computed) if cached + computed else None,  # since the start
            "window_s": self._rates.window_s,
            "output_tokens_per_s": rates["output_tokens"],
            "prompt_tokens_per_s": rates["prompt_tokens"],  # computed ones: those found in the cache took no time
            "requests": self.recent.rows(client),
        }
