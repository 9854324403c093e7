"""What a scheduling policy sees and decides. Policies hold no arrays, no blocks and no clock; time is an argument."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

from jaxserve.request import Request


@dataclasses.dataclass(slots=True)
class View:
    """The scheduler's account of one sequence, read-only to policies."""

    seq_id: str
    request: Request
    arrival_s: float
    num_prompt: int
    num_output: int = 0
    num_preemptions: int = 0


class Policy(Protocol):
    """One published rule of who goes first. Every hook may keep state of its own."""

    def on_arrival(self, view: View, now_s: float) -> None:
        """A sequence has joined the waiting queue for the first time."""
        ...

    def order(self, waiting: Sequence[View], now_s: float) -> Iterator[View]:
        """Waiting sequences in the order of admission. Consumed lazily: what is not yielded does not run."""
        ...

    def victim(self, running: Sequence[View], now_s: float) -> View:
        """Which of the running sequences (in order of admission, not empty) gives its blocks back."""
        ...

    def charge(self, view: View, prefill_tokens: int, decode_tokens: int) -> None:
        """Tokens were computed for a sequence."""
        ...

    def on_finish(self, view: View, now_s: float) -> None:
        """A sequence ended or was aborted."""
        ...
