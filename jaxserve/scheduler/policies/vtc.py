"""Virtual token counter: whichever client has had least service goes first.

VTC (OSDI 2024, arXiv 2401.00588, algorithm 2, prices 1 and 2 per token as in its artifact). While two clients both have
requests waiting, their service never differs by more than 2 * max(prefill_weight * L, decode_weight * M): L tokens of the
longest prompt, M tokens that the pool holds; no rule that never preempts and never idles can promise half of that.

What differs from the paper: a sequence that is preempted is not charged again for what is computed twice, nor does it
count as waiting when newcomers are lifted. An abort gives nothing back. And unless it is `strict`, other clients may
pass one whose next request is too large for what is free: the bound holds for `strict`.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence

from jaxserve.scheduler.clients import Clients, require
from jaxserve.scheduler.policy import Policy, View

_MOST_MISFITS = 4  # requests that find no room, in one step: each is tried in earnest


@dataclasses.dataclass(slots=True)
class Vtc(Policy):
    """Admit the first request of the least served client; who comes back from idling is not owed anything."""

    prefill_weight: float = 1.0  # what a prompt token costs, cached or not; charged on admission
    decode_weight: float = 2.0  # what an answer token costs
    weights: dict[str, float] | None = None  # clients' shares; 1 for all others
    strict: bool = False  # stop at the first request that finds no room, whoever else would fit
    patience_s: float = 10.0  # unless strict: for so long a request that finds no room is passed by others
    _clients: Clients = dataclasses.field(init=False)
    _queued: dict[str, set[str]] = dataclasses.field(default_factory=dict, init=False)  # never admitted so far
    _drained: str = dataclasses.field(default="", init=False)  # the last client to have nothing queued any more
    _passed: dict[str, float] = dataclasses.field(default_factory=dict, init=False)  # since when they find no room
    _misfits: list[View] = dataclasses.field(default_factory=list, init=False)  # in this step

    def __post_init__(self) -> None:
        for name in ("prefill_weight", "decode_weight", "patience_s"):
            require(name, getattr(self, name), 0)
        self._clients = Clients(self.weights)

    def on_arrival(self, view: View, now_s: float) -> None:
        """Queue it. If nothing of its client is queued, the client's count is lifted to the least of those that wait."""
        del now_s
        client, numbers = view.request.client, self._clients.numbers
        self._clients.enter(client)
        if client not in self._queued:
            others = [numbers[each] for each in self._queued]
            floor = min(others) if others else numbers.get(self._drained, 0.0)
            numbers[client] = max(numbers[client], floor)
        self._queued.setdefault(client, set()).add(view.seq_id)

    def order(self, waiting: Sequence[View], running: Sequence[View], now_s: float) -> Iterator[View]:
        """Again and again the first of the client with the least count, which each admission raises."""
        del running, now_s
        queues, self._misfits = dict[str, deque[View]](), []
        for view in waiting:
            queues.setdefault(view.request.client, deque()).append(view)
        while queues:
            client = min(queues, key=self._clients.numbers.__getitem__)
            view = queues[client].popleft()
            yield view
            if not queues[client] or view in self._misfits[-1:]:
                del queues[client]  # its own requests do not pass each other

    def lets_pass(self, view: View, now_s: float) -> bool:
        """Other clients may pass, but not for ever."""
        if self.strict:
            return False
        self._misfits.append(view)
        waited_s = now_s - self._passed.setdefault(view.seq_id, now_s)
        return waited_s < self.patience_s and len(self._misfits) < _MOST_MISFITS

    def on_admit(self, view: View, num_cached: int, now_s: float) -> None:
        """Charge the whole prompt, the first time."""
        del num_cached, now_s
        self._passed.pop(view.seq_id, None)
        self._leave_queue(view)
        if not view.num_preemptions:
            self._clients.add(view.request.client, self.prefill_weight * view.num_prompt)

    def charge(self, view: View, prefill_tokens: int, decode_tokens: int) -> None:
        """Charge answer tokens as they come."""
        del prefill_tokens
        if decode_tokens:
            self._clients.add(view.request.client, self.decode_weight * decode_tokens)

    def on_finish(self, view: View, now_s: float) -> None:
        """What was charged stays charged."""
        del now_s
        self._passed.pop(view.seq_id, None)
        self._leave_queue(view)
        self._clients.leave(view.request.client)

    def _leave_queue(self, view: View) -> None:
        client = view.request.client
        queue = self._queued.get(client)
        if queue is not None and view.seq_id in queue:
            queue.remove(view.seq_id)
            if not queue:
                del self._queued[client]
                self._drained = client
