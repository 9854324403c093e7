"""What a router sees of one replica at one moment. Read-only; routers keep no reference to engines, stores or clocks."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from jaxserve.errors import InvariantError
from jaxserve.request import Request


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One replica. Blocks are KV blocks of `block_size` tokens; times are seconds of the caller's clock.

    `cached` and `service_s` ask the replica when they are called, so that a router pays only for what it looks at.

    Raises:
      InvariantError: numbers that no replica can have.
    """

    replica: int  # its place in the list of replicas: what a router returns
    time_s: float  # when this was true
    num_accepted: int  # requests that it has ever taken in: what a router sent after these is not in this snapshot
    engine_type: str  # replicas of one type serve a request in the same time ("h100 x 2")
    num_slots: int  # most sequences that run at once
    num_blocks: int
    block_size: int
    num_free: int  # blocks that nobody holds; those that only cache a prefix count as free
    num_running: int  # sequences with blocks
    num_waiting: int  # sequences without
    num_urgent: int  # of both, those with a priority below 0
    waiting_blocks: int  # that all waiting sequences together will need to start
    first_waiting_blocks: int  # that the head of the queue needs to start; 0: nobody waits
    queued_tokens: int  # prompt tokens still to be fed, of running and waiting sequences
    work_s: float  # estimated service time of all sequences that have not ended; 0 when idle
    is_draining: bool = False  # takes no new requests
    cached: Callable[[Sequence[int], str], int]  # (tokens, namespace) -> how many of them need not be fed; not a use
    service_s: Callable[[Request], float]  # estimated seconds to serve a request here, alone; never its true length

    def __post_init__(self) -> None:
        counts = (self.replica, self.num_accepted, self.num_free, self.num_running, self.num_waiting, self.num_urgent)
        sums = (self.waiting_blocks, self.first_waiting_blocks, self.queued_tokens, self.work_s)
        if (
            min(counts) < 0
            or min(sums) < 0
            or not math.isfinite(self.work_s + self.time_s)
            or self.block_size < 1
            or self.num_slots < 1
            or self.num_free > self.num_blocks
            or self.num_urgent > self.num_sequences
        ):
            raise InvariantError(f"replica {self.replica} cannot be in such a state: {self}")

    @property
    def num_sequences(self) -> int:
        """That have not ended."""
        return self.num_running + self.num_waiting

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-num_tokens // self.block_size)
