"""The values between scheduler and executor: what to run now, and what came of it. Host-only, frozen, printable."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxserve.request import SamplingParams, Task


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """What stays the same for a sequence as long as it runs."""

    seq_id: str
    epoch: int = 0  # how often the sequence had been preempted when it sat down
    replica: int = 0  # of the weights; slot and blocks are counted within it
    slot: int  # of the state a running sequence keeps on the device
    params: SamplingParams = SamplingParams()
    task: Task = Task.GENERATE
    seed: int = 0


class Row(NamedTuple):
    """Some consecutive tokens of one sequence in one step.

    `token_ids` are the known inputs. `feeds_last` adds one more input, which only the device knows yet: the token this
    row's slot sampled in the step before.
    """

    seat: Seat
    start: int  # position of the first input token
    token_ids: tuple[int, ...]
    feeds_last: bool = False
    blocks: tuple[int, ...] = ()  # the sequence's table, long enough for this step
    samples: bool = False  # whether the next token is chosen after the last input token
    output_index: int = 0  # which output token is sampled; with the seed it fixes the random number
    banned: tuple[int, ...] = ()  # tokens that may not be chosen this time
    logprob_targets: tuple[int, ...] | None = None  # per input token the token after it (-1: not wanted)
    mask: bytes | None = None  # which tokens may be chosen: bit i % 8 of byte i // 8 is token i; None: all of them

    @property
    def num_tokens(self) -> int:
        """Input tokens of this row."""
        return len(self.token_ids) + self.feeds_last

    @property
    def seq_id(self) -> str:
        """Whose tokens they are."""
        return self.seat.seq_id

    @property
    def replica(self) -> int:
        """Of the weights."""
        return self.seat.replica

    @property
    def slot(self) -> int:
        """Within the replica."""
        return self.seat.slot

    @property
    def params(self) -> SamplingParams:
        """How to choose the next token."""
        return self.seat.params

    @property
    def task(self) -> Task:
        """What is wanted of the sequence."""
        return self.seat.task


class BlockCopy(NamedTuple):
    """Copy a whole block before the step runs, within a replica's pool."""

    source: int
    target: int
    replica: int = 0


class BlockSwap(NamedTuple):
    """Copy a whole block between a replica's pool and its tier in host memory."""

    device: int
    host: int
    replica: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SlotStart:
    """A sequence takes a slot whose logits are edited by its history: penalties, bias, allowed tokens."""

    replica: int = 0
    slot: int
    params: SamplingParams
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]


class Load(NamedTuple):
    """One replica's part of a step."""

    num_tokens: int
    num_rows: int
    is_prompt: bool = False  # one prompt, from its first token, and nothing else


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One step. What happens, in this order: blocks are swapped out, then in, then copied; slots start and get the masks of
    their rows; rows run.

    Of two blocks that are swapped out to the same place the later one stays there. A prefetch says that the next step may
    swap the block in, so that its way from host memory can begin now.
    """

    index: int
    rows: tuple[Row, ...]
    swap_outs: tuple[BlockSwap, ...] = ()
    swap_ins: tuple[BlockSwap, ...] = ()
    prefetches: tuple[BlockSwap, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    starts: tuple[SlotStart, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Input tokens of the step, without padding."""
        return sum([len(row.token_ids) + row.feeds_last for row in self.rows])

    @property
    def loads(self) -> tuple[Load, ...]:
        """What each replica with rows has to do."""
        parts: dict[int, list[Row]] = {}
        for row in self.rows:
            parts.setdefault(row.replica, []).append(row)
        return tuple(
            Load(sum(row.num_tokens for row in rows), len(rows), len(rows) == 1 and rows[0].start == 0)
            for rows in parts.values()
        )


class TokenLogprob(NamedTuple):
    """Log-probability of a chosen token, its rank (1 = most likely), and the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RowResult:
    """What one row produced."""

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # one per target of the row
    hidden: np.ndarray[Any, Any] | None = None  # f32[e], for Task.EMBED


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Results in the order of the plan's rows."""

    rows: tuple[RowResult, ...]
    padded_tokens: int = 0  # tokens computed for nothing


class Capacity(NamedTuple):
    """What an executor can hold and run. Blocks, slots and rungs are those of each replica of the weights."""

    num_blocks: int
    block_size: int  # tokens
    num_slots: int  # sequences running at once
    token_rungs: tuple[int, ...]  # step sizes that are compiled, ascending
    max_model_len: int
    num_replicas: int = 1
    num_host_blocks: int = 0  # room in host memory for blocks that are swapped out
