"""What a simulation writes down while it runs: one record for each call, and columns of numbers for steps and gaps.

Millions of tokens pass here, so columns are arrays and a token costs a few hundred nanoseconds.
"""

import hashlib
from array import array
from collections.abc import Sequence

from jaxserve.request import Finish
from jaxserve.scheduler.progress import Progress
from jaxserve.step import StepPlan
from jaxserve.workload.call import Call


class Record:
    """One call's times (seconds of the simulation) and counts. `None`: has not happened."""

    __slots__ = (
        "arrival_s",
        "call",
        "finish",
        "finish_s",
        "first_s",
        "last_s",
        "num_cached",
        "num_output",
        "num_preemptions",
        "num_prompt",
        "refused",
        "replica",
        "start_s",
        "worst_s",
    )

    def __init__(self, call: Call, arrival_s: float, num_prompt: int):
        self.call = call
        self.arrival_s = arrival_s
        self.num_prompt = num_prompt
        self.replica = -1
        self.start_s: float | None = None  # the first step with a part of it began
        self.first_s: float | None = None  # its first token was there
        self.last_s = 0.0  # its newest token was there
        self.worst_s = 0.0  # longest time between two of its tokens
        self.finish_s: float | None = None
        self.finish: Finish | None = None
        self.num_output = 0
        self.num_cached = 0
        self.num_preemptions = 0
        self.refused = ""  # why it was never served

    def begin(self, start_s: float, num_cached: int) -> None:
        """Its first step begins, after so many tokens that need not be fed."""
        self.start_s, self.num_cached = start_s, num_cached


class Steps:
    """One replica's steps in columns."""

    def __init__(self) -> None:
        self.start_s = array("d")  # the device began
        self.end_s = array("d")  # ... and was done
        self.num_rows = array("l")
        self.num_tokens = array("l")
        self.num_decodes = array("l")  # rows of one token that is not of a prompt
        self.num_padded = array("l")  # tokens computed for nothing
        self.swapped_bytes = 0.0
        self.stall_s = 0.0  # that compiles took
        self.digest = hashlib.blake2b(digest_size=16)

    def __len__(self) -> int:
        return len(self.start_s)

    @property
    def busy_s(self) -> float:
        """Seconds in which the device ran a step."""
        return sum(self.end_s) - sum(self.start_s)

    def sign(self, plan: StepPlan) -> None:
        """Make a plan part of the digest: who runs, from where, how many tokens, in which newest block; what is
        copied."""
        rows = plan.rows
        numbers = array("q", [plan.index])
        numbers.extend([row.start for row in rows])
        numbers.extend([len(row.token_ids) + row.feeds_last for row in rows])
        numbers.extend([row.blocks[-1] if row.blocks else -1 for row in rows])
        self.digest.update(numbers.tobytes())
        self.digest.update(" ".join([row.seat.seq_id for row in rows]).encode())
        if plan.swap_outs or plan.swap_ins or plan.prefetches or plan.copies:
            self.digest.update(repr((plan.swap_outs, plan.swap_ins, plan.prefetches, plan.copies)).encode())


class Gaps:
    """Times between tokens of one answer, each with the number of tokens that had it."""

    def __init__(self) -> None:
        self.seconds = array("d")
        self.counts = array("l")

    def note(
        self, progress: Sequence[Progress], records: dict[str, Record], start_s: float, now_s: float
    ) -> list[Progress]:
        """Take the tokens of a step that began at `start_s`; returns who has ended."""
        common, gap_s, number = -1.0, 0.0, 0
        for item in progress:
            result = item.result
            if result.token_id is not None:
                record = records[item.sequence.seq_id]
                last_s = record.last_s
                record.last_s = now_s
                record.num_output += 1
                if last_s == common:
                    number += 1
                elif record.first_s is None:
                    record.first_s = now_s
                    if record.start_s is None:
                        record.begin(start_s, item.row.start)
                    continue
                else:
                    if number:
                        self._add(gap_s, number)
                    common, gap_s, number = last_s, now_s - last_s, 1
                if gap_s > record.worst_s:
                    record.worst_s = gap_s
            else:  # a part of a prompt
                record = records[item.sequence.seq_id]
                if record.start_s is None:
                    record.begin(start_s, item.row.start)
        if number:
            self._add(gap_s, number)
        return [item for item in progress if item.finish]

    def _add(self, gap_s: float, number: int) -> None:
        self.seconds.append(gap_s)
        self.counts.append(number)
