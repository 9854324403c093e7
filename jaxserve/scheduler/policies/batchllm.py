"""BatchLLM (2024, arXiv 2412.03594): requests that begin alike run together, so that their beginning is computed once.

A group is all requests with the same `Request.pin`; its prefix is the first `pin_tokens` tokens. `prefix_groups.py` plans
groups for a whole job, `jaxserve run-batch` does. Groups go in the order in which their first members arrive; who names no
group is one alone. What belongs to the group as a whole is not known here, so who makes it also ends it
(`Scheduler.unpin`), when the last member has ended, however it ended.

Where this differs from the paper: no request of its own computes the prefix, the first member does, and the others wait for
it; they would compute it again. There is no kernel that reads a shared prefix once for all of a step's rows.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from jaxserve.errors import ConfigError
from jaxserve.scheduler.policy import Policy, View
from jaxserve.step import Capacity


@dataclasses.dataclass(slots=True)
class Batchllm(Policy):
    """Admit members of groups that have begun, then, one group after the other, those of groups that have not."""

    # Share of the pool for prefixes of groups that have begun. A group with a longer prefix has to be the only one. A group
    # begins when all members of those before it run, so its prefix is in use: a low share leaves slots empty
    # (docs/reproductions.md), a high one room for answers to grow.
    max_pinned_share: float = 0.8
    # Memory-centric batching: admit while the pool can hold what all who run will have written in the end, with answers of
    # this share of `max_tokens`. 1: nobody is ever preempted (on one replica). None: do not reckon.
    future_share: float | None = None
    capacity: Capacity | None = None  # the executor's, not an option; without it nothing is limited
    _members: Counter[str] = dataclasses.field(default_factory=Counter, init=False)  # of each group, not yet ended
    _open: dict[str, int] = dataclasses.field(default_factory=dict, init=False)  # groups that have begun: prefix blocks
    _feeding: set[str] = dataclasses.field(default_factory=set, init=False)  # groups with a prompt under way
    _num_running: int = dataclasses.field(default=0, init=False)
    _num_future: int = dataclasses.field(default=0, init=False)  # blocks that all who run will have in the end

    def __post_init__(self) -> None:
        for name, share in (("max_pinned_share", self.max_pinned_share), ("future_share", self.future_share)):
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"{name}={share!r} must be above 0 and at most 1")

    def on_arrival(self, view: View, now_s: float) -> None:
        """One more member."""
        del now_s
        if view.request.pin:
            self._members[view.request.pin] += 1

    def order(self, waiting: Sequence[View], running: Sequence[View], now_s: float) -> Iterator[View]:
        """Members of open groups and who was preempted, then the others; without those who had better wait."""
        del now_s
        self._feeding = {view.request.pin for view in running if not view.num_output}
        self._num_running = len(running)
        if self.future_share is not None:
            self._num_future = sum(self._open.values()) + sum(map(self._own_blocks, running))
        cached = dict[str, bool]()
        later = list[View]()
        for view in waiting:
            if view.request.pin not in self._open and not view.num_preemptions:
                later.append(view)
            elif not self._waits(view, cached):
                if not self._fits(view):
                    return
                yield view
        may_open = True
        for view in later:
            if view.request.pin and view.request.pin not in self._open:
                # Groups do not overtake one that has no room yet, or it might wait for ever. Who pins nothing may.
                may_open = may_open and self._may_open(view)
                if not may_open:
                    continue
            if not self._waits(view, cached):
                if not self._fits(view):
                    return
                yield view

    def on_admit(self, view: View, num_cached: int, now_s: float) -> None:
        """Its group has begun."""
        del num_cached, now_s
        name = view.request.pin
        self._num_running += 1
        self._num_future += self._own_blocks(view)
        if name:
            self._feeding.add(name)
            if name not in self._open:
                self._open[name] = self._prefix_blocks(view)
                self._num_future += self._open[name]

    def on_finish(self, view: View, now_s: float) -> None:
        """With its last member a group ends."""
        del now_s
        name = view.request.pin
        if name:
            self._members[name] -= 1
            if not self._members[name]:
                del self._members[name]
                self._open.pop(name, None)

    def _waits(self, view: View, cached: dict[str, bool]) -> bool:
        """Whether a prefix is not there yet, and another member is computing it. `cached` remembers, for one plan."""
        name = view.request.pin
        if name not in self._feeding or not name:
            return False
        if name not in cached:
            size = self.capacity.block_size if self.capacity is not None else 1
            cached[name] = view.num_cached() >= min(view.request.pin_tokens, view.num_prompt - 1) // size * size
        return not cached[name]

    def _may_open(self, view: View) -> bool:
        if self.capacity is None or not self._open:
            return True
        num_pinned = sum(self._open.values()) + self._prefix_blocks(view)
        return num_pinned <= self.max_pinned_share * self.capacity.num_blocks * self.capacity.num_replicas

    def _fits(self, view: View) -> bool:
        if self.capacity is None or self.future_share is None or not self._num_running:
            return True
        num_new = self._own_blocks(view) + (0 if view.request.pin in self._open else self._prefix_blocks(view))
        return self._num_future + num_new <= self.capacity.num_blocks * self.capacity.num_replicas

    def _own_blocks(self, view: View) -> int:
        """Blocks that a sequence will have in the end, beside its group's prefix."""
        if self.capacity is None or self.future_share is None:
            return 0
        num_tokens = view.num_prompt + math.ceil(self.future_share * (view.max_len - view.num_prompt))
        return -(-num_tokens // self.capacity.block_size) - self._prefix_blocks(view)

    def _prefix_blocks(self, view: View) -> int:
        return view.request.pin_tokens // self.capacity.block_size if self.capacity is not None else 0
