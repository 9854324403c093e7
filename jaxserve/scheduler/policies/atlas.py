"""Adaptive thread-level attained service: PLAS for programs that make many calls at the same time.

ATLAS of Autellix (2025, arXiv 2502.13965; NSDI 2026 as Agentix): what counts is the longest path of calls, not their sum.
With `Request.parents` the path is known: p0 of a call is the longest one that leads to it. A call without parents that we
know of begins with the longest path of its program that has ended so far. Of calls one after the other that is PLAS.
Levels, quanta and what differs from the paper: `scheduler/levels.py`.
"""

import dataclasses

from jaxserve.request import Request
from jaxserve.scheduler.levels import Levels, ProgramRow

_MOST_PATHS = 4096  # of one program; names come from outside


@dataclasses.dataclass(slots=True)
class Atlas(Levels):
    """The longest path that leads to the call."""

    def _start(self, row: ProgramRow, request: Request) -> float:
        return max((row.paths[parent] for parent in request.parents if parent in row.paths), default=row.longest)

    def _fold(self, row: ProgramRow, request: Request, before: float, served: float) -> None:
        path = max(before + served, row.paths.pop(request.request_id, 0.0))  # of several answers the longest
        row.paths[request.request_id] = path
        if len(row.paths) > _MOST_PATHS:
            del row.paths[next(iter(row.paths))]
        row.longest = max(row.longest, path)
        row.service += served
