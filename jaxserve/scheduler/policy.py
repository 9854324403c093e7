"""What a scheduling policy sees and decides. Policies hold no arrays, no blocks and no clock; time is an argument.

A policy is a dataclass of options in a file of `policies/`, whose name is the policy's: `policies/plas.py` holds `Plas`.
It overrides the hooks it needs; without any it is first come, first served.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jaxserve.request import Request


class View:
    """The scheduler's account of one sequence, read-only to policies."""

    __slots__ = (
        "_cached",
        "admitted_s",
        "arrival_s",
        "max_len",
        "num_output",
        "num_preemptions",
        "num_prompt",
        "priority",
        "request",
        "seq_id",
    )

    def __init__(self, seq_id: str, request: Request, arrival_s: float, num_prompt: int, max_len: int):
        self.seq_id = seq_id
        self.request = request
        self.arrival_s = arrival_s
        self.admitted_s: float | None = None  # for the first time
        self.num_prompt = num_prompt
        self.max_len = max_len  # tokens, prompt and answer, if no end token comes first
        self.num_output = 0  # tokens that the host knows
        self.num_preemptions = 0
        self.priority = request.priority  # as it is now; callers may change it (`Scheduler.set_priority`)
        self._cached: Callable[[], int] | None = None  # set by the scheduler

    def num_cached(self) -> int:
        """Tokens of a waiting sequence that need not be computed, as of now. Walks the prefix trees: not for free."""
        return 0 if self._cached is None else self._cached()

    def watch_cache(self, cached: Callable[[], int]) -> None:
        """For the scheduler: how `num_cached` finds out."""
        self._cached = cached


class Decodes(NamedTuple):
    """The one-token rows of a step, for policies that size its budget."""

    num_rows: int
    num_context: int  # tokens that they attend to, all together


class Policy:
    """One published rule of who goes first. Every hook may keep state of its own.

    The same calls in the same order with the same times must lead to the same answers: no clock, no unseeded random number.
    """

    def on_arrival(self, view: View, now_s: float) -> None:
        """A sequence has joined the waiting queue for the first time."""

    def order(self, waiting: Sequence[View], running: Sequence[View], now_s: float) -> Iterator[View]:
        """Waiting sequences in the order of admission. Consumed lazily: what is not yielded does not run.

        Between two items, what came before has been admitted, and charged for its first chunk, or has found no room.
        Without an override by arrival; who was preempted is in front.
        """
        del running, now_s
        return iter(waiting)

    def victim(self, running: Sequence[View], now_s: float) -> View:
        """Which of the running sequences (in order of admission, not empty) gives its blocks back when the pool is full."""
        del now_s
        return running[-1]  # it has the least to lose

    def displaced(self, view: View, running: Sequence[View], now_s: float) -> View | None:
        """Which running sequence gives way to a waiting one that finds no room. None: nobody, it waits.

        Asked again until there is room, each time with those who are left. If there is none in the end, nobody goes.
        """
        del view, running, now_s
        return None

    def lets_pass(self, view: View, now_s: float) -> bool:
        """Whether others may be admitted in this step past a waiting sequence that has just found no room.

        Without an override nobody overtakes it. With one, a sequence that is large may wait for ever: set a limit.
        """
        del view, now_s
        return False

    def token_budget(self, decodes: Decodes, most: int) -> int:
        """Tokens of the next step on one replica, at most `most`. Decodes are never left out for it."""
        del decodes
        return most

    def on_admit(self, view: View, num_cached: int, now_s: float) -> None:
        """A waiting sequence takes blocks; so many of its tokens need not be computed. Also when it comes back."""

    def on_preempt(self, view: View, now_s: float) -> None:
        """A running sequence has lost its blocks, and waits again."""

    def charge(self, view: View, prefill_tokens: int, decode_tokens: int) -> None:
        """Work for a sequence: prompt tokens (and answer tokens computed again) when they are planned, answer tokens when
        they are there. What was charged and is planned away again is charged back, so counts may be negative."""

    def on_finish(self, view: View, now_s: float) -> None:
        """A sequence has ended by itself."""

    def on_abort(self, view: View, now_s: float) -> None:
        """A sequence was ended: by its caller, or because a step failed. Without an override as if it had ended."""
        self.on_finish(view, now_s)

    def on_program_end(self, program: str, now_s: float) -> None:
        """The caller says that no more requests of a program will come."""

    def keeps_copy(self, view: View) -> bool:
        """Whether the keys and values of a sequence that has ended are worth a copy in host memory, if there is a tier."""
        del view
        return False

    def tick(self, now_s: float) -> None:
        """A step is about to be planned."""
