"""Unequal replicas: the faster one, or the one with less work: level 1 of HexGen-Text2SQL (Peng et al., 2025, arXiv
2505.05286), in a form that needs no baseline replica."""

import dataclasses
from collections.abc import Sequence

from jaxserve.cluster.rule import Rule
from jaxserve.cluster.snapshot import Snapshot
from jaxserve.errors import ConfigError
from jaxserve.request import Request


def work_aware(service_s: Sequence[float], work_s: Sequence[float], alpha: float) -> list[float]:
    """The score of each replica: alpha * (shortest service / its service) - (1 - alpha) * (its work / most work).

    `service_s`: seconds that a request takes there, alone; `work_s`: seconds of work that is there. Both may be in any
    unit. The paper divides by the work of one baseline replica, which may be idle.
    """
    shortest, most = min(service_s), max(work_s)
    return [
        alpha * (shortest / service if service else 1.0) - (1 - alpha) * (work / most if most else 0.0)
        for service, work in zip(service_s, work_s, strict=True)
    ]


@dataclasses.dataclass(slots=True)
class Hexgen(Rule):
    """The best score. `alpha`: 0 looks at work only, 1 at speed only; to be chosen by simulation of a recent trace."""

    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"router 'hexgen': alpha={self.alpha:g} must be from 0 to 1")

    def choose(self, request: Request, snapshots: Sequence[Snapshot], now_s: float) -> Snapshot:
        """Of equals the one with less work, then the faster, then the first."""
        del now_s
        service_s = [snapshot.service_s(request) for snapshot in snapshots]
        work_s = [snapshot.work_s for snapshot in snapshots]
        scores = work_aware(service_s, work_s, self.alpha)
        ranks = [(-score, work, service) for score, work, service in zip(scores, work_s, service_s, strict=True)]
        return snapshots[ranks.index(min(ranks))]
