"""What clients were given, and how far apart those fell that could have been given more.

Service is charged as in VTC (OSDI 2024, arXiv 2401.00588): a weight for each prompt token that was computed, twice as
much for each answer token. A client is backlogged while a call of its waits that has not begun.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from jaxserve.scheduler.progress import Progress
from jaxserve.sim.record import Record
from jaxserve.workload.call import Workload

PROMPT_WEIGHT, ANSWER_WEIGHT = 1.0, 2.0
_MOST_CLIENTS = 64  # whose pairs are watched: those with the most calls


class Fairness:
    """Charged service by client, and the widest gap of a pair: over all times at which both were backlogged without a
    break, how far the difference of their services moved."""

    def __init__(self, workload: Workload):
        calls = Counter(call.client for call in workload.calls)
        self.service = dict.fromkeys(sorted(calls), 0.0)
        self.worst_gap = 0.0
        self._watched = [client for client, _ in calls.most_common(_MOST_CLIENTS)]
        self._waiting = dict.fromkeys(calls, 0)
        size = len(self._watched)
        self._low, self._high = np.zeros((size, size)), np.zeros((size, size))

    def arrive(self, client: str) -> None:
        """A call waits."""
        self._waiting[client] += 1

    def note(self, progress: Sequence[Progress], records: Mapping[str, Record]) -> None:
        """Charge a step. Comes before its records are updated."""
        service = self.service
        for item in progress:
            row, record = item.row, records[item.sequence.seq_id]
            client = record.call.client
            if record.start_s is None:
                self._waiting[client] -= 1
            is_prompt = row.start < record.num_prompt
            prompt = PROMPT_WEIGHT * (len(row.token_ids) + row.feeds_last) if is_prompt else 0.0
            service[client] += prompt + (ANSWER_WEIGHT if row.samples else 0.0)
        self._compare()

    def jain(self) -> float:
        """Jain's index of service: 1 where all have the same, 1 / clients where one has all."""
        values = list(self.service.values())
        squares = sum(value * value for value in values)
        return sum(values) ** 2 / (len(values) * squares) if squares else 1.0

    def _compare(self) -> None:
        values = np.array([self.service[client] for client in self._watched])
        waits = np.array([self._waiting[client] > 0 for client in self._watched])
        differences = values[:, None] - values[None, :]
        both = waits[:, None] & waits[None, :]
        np.minimum(self._low, differences, out=self._low)
        np.maximum(self._high, differences, out=self._high)
        if both.any():
            self.worst_gap = max(self.worst_gap, float((self._high - self._low)[both].max()))
        np.copyto(self._low, differences, where=~both)  # from here on, should they meet again
        np.copyto(self._high, differences, where=~both)
