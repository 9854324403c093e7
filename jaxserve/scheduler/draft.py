"""One replica's part of a step while it is being put together, and the rows it becomes."""

import dataclasses
from collections.abc import Sequence as Seq

from jaxserve.request import Task
from jaxserve.scheduler.sequence import Sequence
from jaxserve.step import BlockCopy, BlockSwap, Row, SlotStart

# A step reads every weight once, however few its tokens; as a rule of thumb that costs as much as this many tokens.
_STEP_COST_TOKENS = 16


@dataclasses.dataclass(slots=True)
class Draft:
    """Sequences and token counts so far. Decodes come before prompts."""

    budget: int
    entries: list[tuple[Sequence, int]] = dataclasses.field(default_factory=list)
    num_tokens: int = 0  # drafted
    num_context: int = 0  # tokens that decodes attend to
    swap_outs: list[BlockSwap] = dataclasses.field(default_factory=list)
    swap_ins: list[BlockSwap] = dataclasses.field(default_factory=list)
    prefetches: list[BlockSwap] = dataclasses.field(default_factory=list)
    copies: list[BlockCopy] = dataclasses.field(default_factory=list)
    starts: list[SlotStart] = dataclasses.field(default_factory=list)
    is_closed: bool = False  # whether nobody may be admitted any more: who was preempted, or found no room, goes first

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
        self.num_tokens += count

    def remove(self, sequence: Sequence) -> int:
        """Take a sequence out again, and how to start its slot; returns how many of its tokens were drafted."""
        count = sum(count for each, count in self.entries if each is sequence)
        self.entries = [entry for entry in self.entries if entry[0] is not sequence]
        self.starts = [start for start in self.starts if start.slot != sequence.slot]
        self.num_tokens -= count
        return count

    def can_shed(self, count: int) -> bool:
        """Whether the last prompt chunk is longer than `count` tokens."""
        return bool(self.entries) and self.entries[-1][1] > count

    def shed(self, count: int) -> Sequence:
        """Shorten the last prompt chunk; returns whose."""
        sequence, drafted = self.entries[-1]
        self.entries[-1] = (sequence, drafted - count)
        self.num_tokens -= count
        return sequence


def trim(drafts: Seq[Draft], rungs: Seq[int]) -> list[tuple[Sequence, int]]:
    """Shorten last prompt chunks to a compiled step size, where computing the rest later costs less than padding.

    All replicas run the size that the fullest one needs, so all that are above the next smaller size shed what is above
    it, or none does. What they shed is computed in one step, too: it costs what the longest rest costs. Returns whose
    chunks are shorter now, and by how much.
    """
    most = max(draft.num_tokens for draft in drafts)
    if not most or most in rungs:
        return []
    below = max((r for r in rungs if r < most), default=0)
    above = [(draft, draft.num_tokens - below) for draft in drafts if draft.num_tokens > below]
    if not all(draft.can_shed(excess) for draft, excess in above):
        return []
    if below + _STEP_COST_TOKENS + _cost(most - below, rungs) >= _rung(most, rungs):
        return []
    return [(draft.shed(excess), excess) for draft, excess in above]


def _rung(num_tokens: int, rungs: Seq[int]) -> int:
    return next((r for r in rungs if r >= num_tokens), num_tokens)


def _cost(num_tokens: int, rungs: Seq[int]) -> int:
    """Tokens computed for a chunk that is itself cut into rungs where that is cheaper."""
    whole = _rung(num_tokens, rungs)
    below = max((r for r in rungs if r < num_tokens), default=0)
    if not below:
        return whole
    return min(whole, below + _STEP_COST_TOKENS + _cost(num_tokens - below, rungs))


def make_row(sequence: Sequence, count: int, table: tuple[int, ...]) -> Row:
    """The next `count` tokens of a sequence as a row."""
    assert sequence.seat is not None
    start = sequence.num_computed
    end, num_prompt = start + count, sequence.num_prompt
    tokens = sequence.tokens
    known = tuple(tokens[start:end]) if count > 1 else (tokens[start],) if start < len(tokens) else ()
    feeds_last = len(known) < count
    if start >= num_prompt:  # a decode, or several tokens of an answer computed again
        samples = end == len(tokens) + sequence.num_pending
        banned = _banned(sequence, end - num_prompt) if samples and sequence.bans else ()
        mask = sequence.guide.mask() if samples and sequence.guide is not None else None
        return Row(sequence.seat, start, known, feeds_last, table, samples, end - num_prompt, banned, None, mask)
    if sequence.request.task is Task.GENERATE:
        samples = end == sequence.num_total
    else:
        samples = end == num_prompt  # asks for the last hidden state
    output_index = max(end - num_prompt, 0)
    banned = _banned(sequence, output_index) if samples and sequence.bans else ()
    mask = sequence.guide.mask() if samples and sequence.guide is not None else None
    targets = _logprob_targets(sequence, start, count)
    return Row(sequence.seat, start, known, feeds_last, table, samples, output_index, banned, targets, mask)


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


def slot_start(sequence: Sequence) -> SlotStart:
    """What the device has to know of a sequence whose logits are edited, before its first row."""
    prompt = sequence.request.prompt_token_ids
    return SlotStart(
        replica=sequence.replica,
        slot=sequence.slot,
        params=sequence.request.params,
        prompt_token_ids=prompt,
        output_token_ids=tuple(sequence.tokens[len(prompt) :]),
    )
