"""One sequence as the scheduler sees it: tokens known, tokens pending, tokens computed."""

import dataclasses
import enum

from jaxserve.kv.store import Mark
from jaxserve.request import Request, SamplingParams, Task
from jaxserve.scheduler.policy import View
from jaxserve.step import Seat


class State(enum.Enum):
    """Where a sequence is."""

    WAITING = "waiting"  # no blocks; for the first time, or after a preemption
    ARRIVING = "arriving"  # has blocks and a slot; its keys and values are on their way from host memory
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """See the table of index regions in `jaxserve.request`."""

    # Not a dataclass: planning reads these for every sequence in every step.
    __slots__ = (
        "bans",
        "epoch",
        "guide",
        "marks",
        "max_len",
        "needs_host",
        "num_cached",
        "num_computed",
        "num_parked",
        "num_pending",
        "num_prompt",
        "num_scored",
        "parent",
        "replica",
        "request",
        "seat",
        "seed",
        "seq_id",
        "slot",
        "state",
        "tokens",
        "view",
    )

    def __init__(
        self,
        *,
        seq_id: str,
        request: Request,
        seed: int,
        max_len: int,
        arrival_s: float,
        parent: "Sequence | None" = None,
    ):
        """`max_len`: tokens, prompt and answer. `parent`: whose prompt blocks this one shares (n > 1)."""
        self.seq_id = seq_id
        self.request = request
        self.seed = seed
        self.max_len = max_len
        self.parent = parent
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.view = View(seq_id, request, arrival_s, self.num_prompt, max_len)
        self.num_computed = 0  # tokens whose keys and values are, or are being, written
        self.num_pending = 0  # tokens sampled by a step whose result is not here yet
        self.num_parked = 0  # tokens whose keys and values lie in host memory for it, since it was swapped out
        self.state = State.WAITING
        self.replica = 0  # of the weights; where it runs, or ran last
        self.slot = -1
        self.seat: Seat | None = None  # as long as it runs
        self.epoch = 0
        self.marks: dict[int, Mark] = {}  # by replica (-1 - replica: its host memory): what is cached of it
        self.num_scored = 0  # prompt positions whose log-probabilities are computed, or are being
        self.num_cached = 0  # prompt tokens that the prefix cache gave
        self.bans = bool(request.params.min_tokens or request.bad_word_ids)
        # What its answer must look like. It has seen the tokens that are known, wherever the sequence runs or waits.
        self.guide = request.grammar.start() if request.grammar is not None else None
        # Whether the next step depends on the value of the newest token, so that it cannot be planned ahead.
        self.needs_host = self.guide is not None or any(len(words) > 1 for words in request.bad_word_ids)

    @property
    def num_total(self) -> int:
        """Known and pending tokens."""
        return len(self.tokens) + self.num_pending

    @property
    def num_output(self) -> int:
        """Answer tokens, pending ones included."""
        return self.num_total - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens that still have to be fed; 0 when every token that can exist has been."""
        return self.num_total - self.num_computed if self.wants_more else 0

    @property
    def wants_more(self) -> bool:
        """Whether another token is to be sampled, or a prompt-only task has prompt left."""
        if self.request.task is not Task.GENERATE:
            return self.num_computed < self.num_prompt
        return self.num_total < self.max_len

    @property
    def is_prefill(self) -> bool:
        """Whether more than the newest token has to be fed."""
        return self.num_left > 1 or self.num_computed < self.num_prompt

    @property
    def awaits_parent(self) -> bool:
        """Whether its prompt is being computed by a sibling right now, or soon will be."""
        parent = self.parent
        if parent is None or self.num_output or parent.state is State.FINISHED:
            return False
        return parent.num_computed < parent.num_prompt

    def sit(self, replica: int, slot: int) -> None:
        """Take a slot."""
        self.replica, self.slot = replica, slot
        self.seat = Seat(
            seq_id=self.seq_id,
            epoch=self.epoch,
            replica=replica,
            slot=slot,
            params=_for_devices(self.request.params),
            task=self.request.task,
            seed=self.seed,
        )


def _for_devices(params: SamplingParams) -> SamplingParams:
    """Options as they travel with every step: a schema may be long, and only the host reads it."""
    return params if params.structured_outputs is None else dataclasses.replace(params, structured_outputs=None)
