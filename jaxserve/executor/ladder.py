"""The shapes that are compiled. A step is padded to the next rung; few rungs, so that start-up is short."""

from collections.abc import Iterable
from typing import NamedTuple


class Rung(NamedTuple):
    """One compiled step: so many tokens in so many rows. `decode_only` rungs take one token per row."""

    tokens: int
    rows: int
    decode_only: bool


def build_ladder(max_num_seqs: int, token_budget: int, multiple: int = 1) -> tuple[Rung, ...]:
    """Decode rungs double up to `max_num_seqs`; prefill rungs are 16 and 64, then double from 256 up to the budget.

    Contexts need no rungs: attention loops run as far as the longest row. Rungs in between would cut padding further,
    but the scheduler already cuts prompts at rungs where that is cheaper (`scheduler.draft`).

    `multiple`: all sizes are multiples of it; devices share a step's tokens evenly.
    """
    decode = [*_doubling(1, max_num_seqs), max_num_seqs]
    # Decodes are never dropped for the budget, so a mixed step may hold max_num_seqs tokens more than it.
    top = max(token_budget, max_num_seqs)
    prefill = [r for r in (16, 64) if r < top] + [*_doubling(256, top), top]
    decode, prefill = ([-(-r // multiple) * multiple for r in rungs] for rungs in (decode, prefill))
    return tuple(
        [Rung(r, r, True) for r in dict.fromkeys(decode)]
        + [Rung(t, min(t, decode[-1]), False) for t in dict.fromkeys(prefill)]
    )


def fit(ladder: Iterable[Rung], num_tokens: int, num_rows: int) -> Rung:
    """The smallest rung that holds a step."""
    decode_only = num_tokens == num_rows
    holds = [r for r in ladder if r.tokens >= num_tokens and r.rows >= num_rows and (decode_only or not r.decode_only)]
    return min(holds, key=lambda r: (r.tokens, r.rows, not r.decode_only))


def _doubling(start: int, stop: int) -> Iterable[int]:
    while start < stop:
        yield start
        start *= 2
