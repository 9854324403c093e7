"""First come, first served: the order of vLLM and Sarathi-Serve (OSDI 2024, arXiv 2403.02310), and the default."""

import dataclasses

from jaxserve.scheduler.policy import Policy


@dataclasses.dataclass(slots=True)
class Fcfs(Policy):
    """Admit by arrival; preempt who was admitted last."""
