"""One sequence as the scheduler sees it: tokens known, tokens pending, tokens computed."""

import dataclasses
import enum

from jaxserve.request import Request, Task
from jaxserve.scheduler.policy import View


class State(enum.Enum):
    """Where a sequence is."""

    WAITING = "waiting"  # no blocks; for the first time, or after a preemption
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """See the table of index regions in `jaxserve.request`."""

    seq_id: str
    request: Request
    seed: int
    max_len: int  # tokens, prompt and answer
    view: View
    parent: "Sequence | None" = None  # whose prompt blocks this one shares (n > 1)
    tokens: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are, or are being, written
    num_pending: int = 0  # tokens sampled by a step whose result is not here yet
    state: State = State.WAITING
    replica: int = 0  # of the weights; where it runs, or ran last
    slot: int = -1
    epoch: int = 0
    num_scored: int = 0  # prompt positions whose log-probabilities are computed, or are being
    num_cached: int = 0  # prompt tokens that the prefix cache gave

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

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
    def needs_host(self) -> bool:
        """Whether the next step depends on the value of the newest token, so that it cannot be planned ahead."""
        return any(len(words) > 1 for words in self.request.bad_word_ids)
