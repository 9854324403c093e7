"""Where most of the prompt is cached, unless loads drift apart: the cache-aware policy of SGLang's router (v0.4, 2024), with
the defaults of its successor SMG. That one guesses what replicas cache from what it has sent; here they are asked."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from jaxserve.cluster.rule import Rule, least_used
from jaxserve.cluster.snapshot import Snapshot
from jaxserve.errors import ConfigError
from jaxserve.request import Request


@dataclasses.dataclass(slots=True)
class PrefixAffinity(Rule):
    """The longest cached prefix, if it is more than `least_share` of the prompt; else the least used replica.

    Also the least used one when sequences are uneven: the fullest replica has more than `most_apart` sequences more than the
    emptiest, and more than `most_ratio` times as many.
    """

    asks_cached: ClassVar[bool] = True
    least_share: float = 0.3
    most_apart: int = 64
    most_ratio: float = 1.5

    def __post_init__(self) -> None:
        if not (0 <= self.least_share <= 1 and self.most_apart >= 0 and self.most_ratio >= 1):
            raise ConfigError(
                f"router 'prefix_affinity': least_share={self.least_share:g}, most_apart={self.most_apart}, "
                f"most_ratio={self.most_ratio:g} must be a share, 0 or more, and 1 or more"
            )

    def choose(self, request: Request, snapshots: Sequence[Snapshot], now_s: float) -> Snapshot:
        """Of several with the same prefix the least used."""
        del now_s
        loads = [snapshot.num_sequences for snapshot in snapshots]
        if max(loads) - min(loads) > self.most_apart and max(loads) > self.most_ratio * min(loads):
            return least_used(snapshots)
        found = [s.cached(request.prompt_token_ids, request.namespace) for s in snapshots]
        longest = max(found)
        if longest <= self.least_share * len(request.prompt_token_ids):
            return least_used(snapshots)
        return least_used([s for s, count in zip(snapshots, found, strict=True) if count == longest])
