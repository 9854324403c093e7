"""The freest replica by virtual usage: dispatch of Llumnix (Sun et al., OSDI 2024, arXiv 2406.03243). Its migration of
running requests is not here."""

import dataclasses
import math
from collections.abc import Sequence

from jaxserve.cluster.rule import Rule
from jaxserve.cluster.snapshot import Snapshot
from jaxserve.errors import ConfigError
from jaxserve.request import Request


def freeness(snapshot: Snapshot, headroom_tokens: int = 0, *, divides_shortage: bool = False) -> float:
    """Tokens that each sequence can still write here, if those that wait run, too, and so many stay unused.

    Infinite on an empty replica. Below 0 more is wanted than there is: so many tokens, or, with `divides_shortage`, so many
    for each sequence.
    """
    if not snapshot.num_sequences:
        return math.inf
    free = (snapshot.num_free - snapshot.waiting_blocks) * snapshot.block_size - headroom_tokens
    return free / snapshot.num_sequences if free > 0 or divides_shortage else float(free)


@dataclasses.dataclass(slots=True)
class Llumnix(Rule):
    """To the freest. Where urgent requests (priority below 0) are, all but `urgent_tokens` of the pool count as used for
    others, so that these stay away until the rest is as full; for urgent requests they do not.

    1,600 tokens are the artifact's. That urgent requests go first in the replica is left to its policy, `priority`.

    `divides_shortage` is the published rule: also what is missing is divided by the number of sequences. Then of full
    replicas the one with the longest queue looks freest, and once all are full it gets ever more (docs/reproductions.md).
    """

    urgent_tokens: int = 1600
    divides_shortage: bool = False

    def __post_init__(self) -> None:
        if self.urgent_tokens < 0:
            raise ConfigError(f"router 'llumnix': urgent_tokens={self.urgent_tokens} must be 0 or more")

    def choose(self, request: Request, snapshots: Sequence[Snapshot], now_s: float) -> Snapshot:
        """Of equals the one with the most free blocks, then the first."""
        del now_s
        is_urgent = request.priority < 0

        def rank(snapshot: Snapshot) -> tuple[float, int, int]:
            is_kept = snapshot.num_urgent and not is_urgent
            pool = snapshot.num_blocks * snapshot.block_size
            headroom = max(pool - self.urgent_tokens, 0) if is_kept else 0
            return (
                freeness(snapshot, headroom, divides_shortage=self.divides_shortage),
                snapshot.num_free,
                -snapshot.replica,
            )

        return max(snapshots, key=rank)
