"""Fair to clients and kind to prefix caches: D2LPM (Cao et al., "Locality-aware Fair Scheduling in LLM Serving", 2025, arXiv
2501.14312), a deficit for each client and replica over replicas that run DLPM themselves."""

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

from jaxserve.cluster.rule import Rule, least_used
from jaxserve.cluster.snapshot import Snapshot
from jaxserve.errors import ConfigError
from jaxserve.request import Request

_MOST_CLIENTS = 10_000  # names come from outside


@dataclasses.dataclass(slots=True)
class D2Lpm(Rule):
    """Of the replicas on which a client has credit left, those that hold most of the prompt; of these the least used.

    A request costs `prefill_weight` for each token of its prompt when it is sent, whether cached or not, and
    `decode_weight` for each token of its answer when it has ended. When a client has no credit anywhere, each replica
    gets `quantum` more, until there is some: so a client's service differs by at most quantum + the largest overdraft
    between two replicas that were always there. A large quantum follows the caches, a small one spreads a client evenly;
    the default is some ten long prompts (docs/reproductions.md).

    What is charged at the routing is not said in the abstract; the whole prompt is what a re-implementation took.
    """

    asks_cached: ClassVar[bool] = True
    quantum: float = 50_000.0
    prefill_weight: float = 1.0
    decode_weight: float = 2.0
    _credits: OrderedDict[str, dict[int, float]] = dataclasses.field(default_factory=OrderedDict, init=False)

    def __post_init__(self) -> None:
        if not (self.quantum > 0 and math.isfinite(self.quantum)):
            raise ConfigError(f"router 'd2lpm': quantum={self.quantum:g} must be a number above 0")
        if self.prefill_weight < 0 or self.decode_weight < 0 or not self.prefill_weight + self.decode_weight < math.inf:
            raise ConfigError(
                f"router 'd2lpm': prefill_weight={self.prefill_weight:g} and decode_weight={self.decode_weight:g} "
                "must not be negative"
            )

    def choose(self, request: Request, snapshots: Sequence[Snapshot], now_s: float) -> Snapshot:
        """Charges the prompt."""
        del now_s
        credit = self._of(request.client)
        best = max(credit.get(snapshot.replica, 0.0) for snapshot in snapshots)
        if best <= 0:
            refill = (math.floor(-best / self.quantum) + 1) * self.quantum
            for snapshot in snapshots:
                credit[snapshot.replica] = credit.get(snapshot.replica, 0.0) + refill
        able = [snapshot for snapshot in snapshots if credit.get(snapshot.replica, 0.0) > 0]
        found = [snapshot.cached(request.prompt_token_ids, request.namespace) for snapshot in able]
        longest = max(found)
        choice = least_used([s for s, count in zip(able, found, strict=True) if count == longest])
        credit[choice.replica] -= self.prefill_weight * len(request.prompt_token_ids)
        return choice

    def on_finish(self, request: Request, replica: int, num_output: int) -> None:
        """Charges the answer. Nothing is given back for one that was broken off."""
        credit = self._of(request.client)
        credit[replica] = credit.get(replica, 0.0) - self.decode_weight * num_output

    def _of(self, client: str) -> dict[int, float]:
        credit = self._credits.setdefault(client, {})
        self._credits.move_to_end(client)
        if len(self._credits) > _MOST_CLIENTS:
            self._credits.popitem(last=False)
        return credit
