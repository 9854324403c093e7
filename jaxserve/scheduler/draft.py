"""One replica's part of a step while it is being put together, and the rows it becomes."""

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
    is_closed: bool = False  # whether nobody may be admitted any more: who was preempted, or found no room, goes first

    @property
    def num_tokens(self) -> int:
        """Tokens drafted."""
        return sum(count for _, count in self.entries)

    @property
    def budget_left(self) -> int:
        """Tokens that may still be drafted; not negative, although decodes are never dropped for the budget."""
        return max(self.budget - self.num_tokens, 0)

    @property
    def may_admit(self) -> bool:
        """Whether a waiting sequence may join."""
        return self.budget_left > 0 and not self.is_closed

    def add(self, sequence: Sequence, count: int) -> None:
        """Draft tokens of a sequence."""
        self.entries.append((sequence, count))

    def can_shed(self, count: int) -> bool:
        """Whether the last prompt chunk is longer than `count` tokens."""
        return bool(self.entries) and self.entries[-1][1] > count

    def shed(self, count: int) -> None:
        """Shorten the last prompt chunk."""
        sequence, drafted = self.entries[-1]
        self.entries[-1] = (sequence, drafted - count)


def trim(drafts: Seq[Draft], rungs: Seq[int]) -> None:
    """Shorten last prompt chunks to a compiled step size, where computing the rest later costs less than padding.

    All replicas run the size that the fullest one needs, so all that are above the next smaller size shed what is above
    it, or none does. What they shed is computed in one step, too: it costs what the longest rest costs.
    """
    most = max(draft.num_tokens for draft in drafts)
    below = max((r for r in rungs if r < most), default=0)
    above = [(draft, draft.num_tokens - below) for draft in drafts if draft.num_tokens > below]
    if not all(draft.can_shed(excess) for draft, excess in above):
        return
    if below + _STEP_COST_TOKENS + _cost(most - below, rungs) < _rung(most, rungs):
        for draft, excess in above:
            draft.shed(excess)


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
        replica=sequence.replica,
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
