"""What steps have done: for one sequence, and in all."""

import dataclasses
from typing import NamedTuple

from jaxserve.request import Finish, Request, Task
from jaxserve.scheduler.sequence import Sequence
from jaxserve.step import Row, RowResult


class Progress(NamedTuple):
    """What a step did for one sequence."""

    sequence: Sequence
    row: Row
    result: RowResult
    finish: Finish | None


@dataclasses.dataclass(slots=True)
class Counters:
    """Totals since the start."""

    steps: int = 0
    prompt_tokens: int = 0  # fed, recomputed ones included
    output_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens that did not have to be fed
    sought_tokens: int = 0  # those that could have been: of all who were admitted
    preemptions: int = 0
    displaced: int = 0  # of those: because the policy wanted somebody else to run
    swapped: int = 0  # of those: whose blocks went to host memory
    swap_out_blocks: int = 0
    swap_in_blocks: int = 0
    wasted_rows: int = 0  # computed for a sequence that had already ended
    replica_tokens: list[int] = dataclasses.field(default_factory=list)  # fed on each replica: how even their loads are


def finish_of(sequence: Sequence, row: Row) -> Finish | None:
    """Why a sequence ends with a row whose token it has got; None: it goes on, and its guide has seen the token."""
    request = sequence.request
    if request.task is not Task.GENERATE:
        return Finish.STOP if row.start + row.num_tokens >= sequence.num_prompt else None
    if not row.samples:
        return None
    token, guide = sequence.tokens[-1], sequence.guide
    if is_end(request, token):
        return Finish.STOP
    if guide is not None:
        guide.advance(token)
        if guide.is_done or guide.error:
            return Finish.STOP if guide.is_done else Finish.ERROR
    return Finish.LENGTH if len(sequence.tokens) >= sequence.max_len else None


def is_end(request: Request, token_id: int) -> bool:
    """Whether a token says that the answer is over, and so is no part of it. With a grammar, end tokens always do: it allows
    none before the answer is complete."""
    params = request.params
    if token_id in params.stop_token_ids:
        return True
    return token_id in request.eos_token_ids and (not params.ignore_eos or request.grammar is not None)
