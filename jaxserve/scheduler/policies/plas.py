"""Program-level attained service: a call goes as far back as its program was served already.

PLAS of Autellix (2025, arXiv 2502.13965; NSDI 2026 as Agentix), for programs that make one call after the other: p0 of a
call is the service of its program when it comes; when it ends its own is added. The paper reports 4 to 15 times the
throughput of programs of vLLM at the same latency. Levels, quanta and what differs from the paper: `scheduler/levels.py`.
"""

import dataclasses

from jaxserve.request import Request
from jaxserve.scheduler.levels import Levels, ProgramRow


@dataclasses.dataclass(slots=True)
class Plas(Levels):
    """The sum over all calls of the program that have ended: live ones would compete with their siblings."""

    def _start(self, row: ProgramRow, request: Request) -> float:
        del request
        return row.service

    def _fold(self, row: ProgramRow, request: Request, before: float, served: float) -> None:
        del request, before
        row.service += served
