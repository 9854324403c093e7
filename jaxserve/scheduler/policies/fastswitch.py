"""Priorities that change while requests run: who is urgent now displaces who is less so, and switches are cheap.

FastSwitch (2024, arXiv 2411.18424) shows how: blocks of who is preempted go to host memory and come back while others run,
only what is not there yet is copied, and copies outlive a turn, so that the next turn of a conversation finds them. The
paper reports 1.4 to 5.8 times shorter tails of the time to the first token, and up to 11.2 times between tokens, than
vLLM with swapping. Tickets, tiers and copies are the scheduler's own (`scheduler/replica.py`, `kv/host.py`); without host
memory (`swap_space`) who is displaced is computed again. This file says who goes.

The paper replays made-up priorities, "Random" and "Markov", updated 0.04 times per step (8B model; 32B: 0.02). Its text was
not at hand: how it draws them is not known to us, nor how many there are. What it does about runs of neighbouring blocks
has no counterpart here, because blocks are gathered on the device before they leave it.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence

from jaxserve.errors import ConfigError
from jaxserve.scheduler.policy import Policy, View

TRACES = ("caller", "random", "markov")


class _Call:
    __slots__ = ("drawn", "running_since", "view", "waits_since_s")

    def __init__(self, view: View, now_s: float):
        self.view = view
        self.drawn: int | None = None  # what the trace has for it, from its first update on
        self.running_since = 0  # the step of its admission
        self.waits_since_s = now_s  # when it came, or lost its blocks

    @property
    def priority(self) -> float:
        return self.view.priority if self.drawn is None else self.drawn


@dataclasses.dataclass(slots=True)
class Fastswitch(Policy):
    """Smaller priorities first, then by arrival; nobody is displaced within `residency` steps of its admission.

    `trace`: `caller`, priorities are those of requests, which callers may change at any time; `random`, every
    1 / `frequency` steps each conversation (program, or else request) draws one of `levels`; `markov`, it keeps the
    one it has with probability `stay`. Draws depend on `seed`, the conversation and the number of the update alone.
    Who has waited `patience_s` seconds goes before all others. `keep_copies`: of conversations, in host memory, for
    their next turn.
    """

    trace: str = "caller"
    frequency: float = 0.04
    levels: int = 8
    stay: float = 0.8
    seed: int = 0
    residency: int = 8
    patience_s: float = 600.0
    keep_copies: bool = True
    _calls: dict[str, _Call] = dataclasses.field(init=False, repr=False, default_factory=dict)
    _steps: int = dataclasses.field(init=False, repr=False, default=0)
    _updates: int = dataclasses.field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        if self.trace not in TRACES:
            raise ConfigError(f"scheduling option trace={self.trace!r:.40} must be one of {', '.join(TRACES)}")
        for name, least, most in (
            ("frequency", 0, 1),
            ("stay", 0, 1),
            ("levels", 1, 1 << 32),
            ("residency", 0, 1 << 32),
        ):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"scheduling option {name}={getattr(self, name)!r} must be from {least} to {most}")
        if self.patience_s < 0:
            raise ConfigError(f"scheduling option patience_s={self.patience_s!r} must not be negative")

    def on_arrival(self, view: View, now_s: float) -> None:
        """With the priority of its request."""
        self._calls[view.seq_id] = _Call(view, now_s)

    def order(self, waiting: Sequence[View], running: Sequence[View], now_s: float) -> Iterator[View]:
        """By priority as it is now, then arrival; before them who has waited too long."""
        del running
        calls = sorted(map(self._call, waiting), key=lambda call: (self._urgency(call, now_s), call.view.arrival_s))
        return (call.view for call in calls)

    def victim(self, running: Sequence[View], now_s: float) -> View:
        """The least urgent, and of those the latest."""
        del now_s
        return max(map(self._call, running), key=lambda call: (call.priority, call.view.arrival_s)).view

    def displaced(self, view: View, running: Sequence[View], now_s: float) -> View | None:
        """The least urgent of those that are less urgent than the waiting one, and have run for long enough."""
        urgency = self._urgency(self._call(view), now_s)
        behind = [
            call
            for call in map(self._call, running)
            if call.priority > urgency and self._steps - call.running_since >= self.residency
        ]
        return max(behind, key=lambda call: (call.priority, call.view.arrival_s)).view if behind else None

    def on_admit(self, view: View, num_cached: int, now_s: float) -> None:
        """It runs, or its blocks are on their way."""
        del num_cached, now_s
        self._call(view).running_since = self._steps

    def on_preempt(self, view: View, now_s: float) -> None:
        """It waits."""
        self._call(view).waits_since_s = now_s

    def on_finish(self, view: View, now_s: float) -> None:
        """Forget it."""
        del now_s
        del self._calls[view.seq_id]

    def keeps_copy(self, view: View) -> bool:
        """Conversations go on."""
        return self.keep_copies and bool(view.request.program)

    def tick(self, now_s: float) -> None:
        """The trace goes on with the steps."""
        del now_s
        self._steps += 1
        if self.trace != "caller" and int(self._steps * self.frequency) > self._updates:
            self._updates += 1
            for call in self._calls.values():
                self._draw(call)

    def _call(self, view: View) -> _Call:
        return self._calls[view.seq_id]

    def _urgency(self, call: _Call, now_s: float) -> float:
        """Smaller goes first."""
        return -math.inf if now_s - call.waits_since_s >= self.patience_s else call.priority

    def _draw(self, call: _Call) -> None:
        request = call.view.request
        key = f"{self.seed} {self._updates} {request.program or request.request_id}".encode()
        drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())
        changes = (drawn >> 32) / (1 << 32) >= self.stay
        if self.trace == "random" or changes:
            call.drawn = (drawn & 0xFFFFFFFF) % self.levels
