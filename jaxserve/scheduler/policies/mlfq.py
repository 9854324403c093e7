"""Multi-level feedback queues for single calls: long ones make way for short ones, whatever program they are of.

The baseline that Autellix (2025, arXiv 2502.13965) compares with, and the idea of FastServe (2023, arXiv 2305.05920)
without its skip-join by prompt length. Levels and quanta: `scheduler/levels.py`.
"""

import dataclasses

from jaxserve.request import Request
from jaxserve.scheduler.levels import Levels
from jaxserve.scheduler.policy import View


@dataclasses.dataclass(slots=True)
class Mlfq(Levels):
    """Every call begins on the first level, and nothing is remembered of programs."""

    def _member(self, view: View) -> Request:
        return dataclasses.replace(view.request, program="")
