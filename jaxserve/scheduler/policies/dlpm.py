"""Deficit longest prefix match: the order of LPM among clients that have credit left, so that it stays fair.

DLPM (2025, arXiv 2501.14312, algorithm 1; up to 2.87 times the throughput of VTC). Each client spends credit: on prompt
tokens that are not cached when it is admitted, on answer tokens as they come. A client without credit is passed over; when
all who wait are, each gets one quantum more. A small quantum serves the least served client (VTC), a large one the longest
prefix (LPM). While two clients both have requests waiting, their service never differs by more than 2 * (quantum + U): U is
the cost of the longest prompt and of all answer tokens that a client's running requests can still make.

What differs: credit is given to all clients in debt, also to those that only decode now, as independent implementations do
(that U stays as small); several quanta at once where none of them alone would let anybody in; what is computed again after
a preemption is not charged; an abort gives nothing back. Of prefixes that clients share, whoever computes them pays. Old
requests get their turn and long queues are cut short as in `lpm.py`, here by client.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from jaxserve.scheduler.clients import Clients, require
from jaxserve.scheduler.policies.lpm import Lpm
from jaxserve.scheduler.policy import Policy, View


@dataclasses.dataclass(slots=True)
class Dlpm(Policy):
    """Admit by length of the cached prefix whoever has credit."""

    quantum: float = 4096.0  # credit per refill; about one prompt that is not cached is a good start
    prefill_weight: float = 1.0  # what a prompt token costs that has to be computed
    decode_weight: float = 2.0  # what an answer token costs
    weights: dict[str, float] | None = None  # clients' shares; 1 for all others
    patience_s: float = 10.0  # as in lpm
    window: int = 128  # as in lpm; of each client the same share
    _clients: Clients = dataclasses.field(init=False)  # credit of each; never above the quantum
    _lpm: Lpm = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        require("quantum", self.quantum, 1e-3, 1e15)
        for name in ("prefill_weight", "decode_weight"):
            require(name, getattr(self, name), 0)
        self._clients = Clients(self.weights)
        self._lpm = Lpm(patience_s=self.patience_s, window=self.window)

    def on_arrival(self, view: View, now_s: float) -> None:
        """A new client begins without credit: it waits until those who have some have spent it, or wait no longer."""
        del now_s
        self._clients.enter(view.request.client)

    def order(self, waiting: Sequence[View], running: Sequence[View], now_s: float) -> Iterator[View]:
        """Those with credit; then, as often as more is asked for, a refill and those who have some now."""
        if len(waiting) > self.window:
            waiting = _by_turns(waiting)
        left, credit = list(self._lpm.order(waiting, running, now_s)), self._clients.numbers
        while left:
            poor = list[View]()
            for view in left:
                if credit[view.request.client] > 0:
                    yield view
                else:
                    poor.append(view)
            if poor:
                self._refill({view.request.client for view in poor})
            left = poor

    def on_admit(self, view: View, num_cached: int, now_s: float) -> None:
        """Charge what has to be computed of the prompt, the first time."""
        self._lpm.on_admit(view, num_cached, now_s)
        if not view.num_preemptions:
            self._clients.add(view.request.client, -self.prefill_weight * (view.num_prompt - num_cached))

    def charge(self, view: View, prefill_tokens: int, decode_tokens: int) -> None:
        """Charge answer tokens as they come."""
        del prefill_tokens
        if decode_tokens:
            self._clients.add(view.request.client, -self.decode_weight * decode_tokens)

    def on_finish(self, view: View, now_s: float) -> None:
        """What was charged stays charged."""
        del now_s
        self._clients.leave(view.request.client)

    def _refill(self, poor: set[str]) -> None:
        """As many quanta as it takes until one of these clients has credit; nobody gets one who has credit."""
        credit = self._clients.numbers
        most = min(self._num_missing(credit[client]) for client in poor)
        for client, amount in credit.items():
            if amount <= 0:
                credit[client] = amount + self.quantum * min(most, self._num_missing(amount))

    def _num_missing(self, amount: float) -> int:
        """Quanta that make this positive."""
        return math.floor(-amount / self.quantum) + 1


def _by_turns(waiting: Sequence[View]) -> list[View]:
    """The oldest of each client, then the second oldest of each, and so on."""
    rounds, counts = list[list[View]](), dict[str, int]()
    for view in waiting:
        client = view.request.client
        turn = counts[client] = counts.get(client, -1) + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(view)
    return [view for views in rounds for view in views]
