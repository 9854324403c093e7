"""A step while it is being put together, and the row it becomes."""

import dataclasses
from collections.abc import Sequence as Seq

from jaxserve.request import Task
from jaxserve.scheduler.sequence import Sequence
from jaxserve.step import BlockCopy, Row, SlotStart

# A step reads every weight once, however few its tokens; as a rule of thumb that costs as much as this many tokens.
_STEP_COST_TOKENS = 16


@dataclasses.dataclass(slots=True)
class Draft:
    """Sequences and token counts so far. Decodes come before prompts."""

    budget: int
    entries: list[tuple[Sequence, int]] = dataclasses.field(default_factory=list)
    copies: list[BlockCopy] = dataclasses.field(default_factory=list)
    starts: list[SlotStart] = dataclasses.field(default_factory=list)
    preempted: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens drafted."""
        return sum(count for _, count in self.entries)

    @property
    def budget_left(self) -> int:
        """Tokens that may still be drafted; not negative, although decodes are never dropped for the budget."""
        return max(self.budget - self.num_tokens, 0)

    def add(self, sequence: Sequence, count: int) -> None:
        """Draft tokens of a sequence."""
        self.entries.append((sequence, count))

    def trim(self, rungs: Seq[int]) -> None:
        """Shorten the last prompt chunk to a compiled step size, where computing the rest later costs less than padding."""
        if not self.entries or self.entries[-1][1] <= 1:
            return
        sequence, count = self.entries[-1]
        excess = self.num_tokens - max((r for r in rungs if r < self.num_tokens), default=0)
        if not 0 < excess < count:
            return
        below = self.num_tokens - excess
        if below + _STEP_COST_TOKENS + _cost(excess, rungs) < _rung(self.num_tokens, rungs):
            self.entries[-1] = (sequence, count - excess)


def _rung(num_tokens: int, rungs: Seq[int]) -> int:
    return next((r for r in rungs if r >= num_tokens), num_tokens)


def _cost(num_tokens: int, rungs: Seq[int]) -> int:
    """Tokens computed for a chunk that is itself cut into rungs where that is cheaper."""
    whole = _rung(num_tokens, rungs)
    below = max((r for r in rungs if r < num_tokens), default=0)
    if not below:
        return whole
    return min(whole, below + _STEP_COST_TOKENS + _cost(num_tokens - below, rungs))


def make_row(sequence: Sequence, count: int, table: Seq[int]) -> Row:
    """The next `count` tokens of a sequence as a row."""
    request, start = sequence.request, sequence.num_computed
    known = tuple(sequence.tokens[start : start + count])
    end = start + count
    if request.task is Task.GENERATE:
        samples = end == sequence.num_total
    else:
        samples = end == sequence.num_prompt  # asks for the last hidden state
    output_index = max(end - sequence.num_prompt, 0)
    return Row(
        seq_id=sequence.seq_id,
        epoch=sequence.epoch,
        slot=sequence.slot,
        start=start,
        token_ids=known,
        feeds_last=len(known) < count,
        blocks=tuple(table),
        samples=samples,
        params=request.params,
        task=request.task,
        seed=sequence.seed,
        output_index=output_index,
        banned=_banned(sequence, output_index) if samples else (),
        logprob_targets=_logprob_targets(sequence, start, count),
    )


def _logprob_targets(sequence: Sequence, start: int, count: int) -> tuple[int, ...] | None:
    """For each input token the prompt token after it, where its log-probability is wanted and not yet known, else -1."""
    first = sequence.request.logprobs_from
    if first is None:
        return None
    prompt = sequence.request.prompt_token_ids
    first = max(first, sequence.num_scored)
    targets = tuple(prompt[p] if first <= p < len(prompt) else -1 for p in range(start + 1, start + count + 1))
    return targets if any(t >= 0 for t in targets) else None


def _banned(sequence: Sequence, output_index: int) -> tuple[int, ...]:
    """Tokens that may not come next: ends before `min_tokens`, and the last token of a bad word begun."""
    request = sequence.request
    banned = list[int]()
    if output_index < request.params.min_tokens:
        banned += [*request.eos_token_ids, *request.params.stop_token_ids]
    output = sequence.tokens[sequence.num_prompt :]
    for word in request.bad_word_ids:
        begun = len(word) - 1
        if not begun or tuple(output[-begun:]) == word[:-1]:
            banned.append(word[-1])
    return tuple(banned)
