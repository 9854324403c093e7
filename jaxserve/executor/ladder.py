"""The shapes that are compiled. A step is padded to the next rung; few rungs, so that start-up is short."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from jaxserve.step import Load


class Rung(NamedTuple):
    """One compiled step: so many tokens in so many rows. `decode_only` rungs take one token per row; rungs with a `scheme`
    take one prompt, from its first token, whose attention devices share in that way (`sharding.scheme`)."""

    tokens: int
    rows: int
    decode_only: bool
    scheme: str | None = None


def build_ladder(
    max_num_seqs: int,
    token_budget: int,
    multiple: int = 1,
    scheme_of: Callable[[int], str | None] = lambda tokens: None,
) -> tuple[Rung, ...]:
    """Decode rungs double up to `max_num_seqs`; prefill rungs are 16 and 64, then double from 256 up to the budget.

    Contexts need no rungs: attention loops run as far as the longest row. Rungs in between would cut padding further,
    but the scheduler already cuts prompts at rungs where that is cheaper (`scheduler.draft`).

    `multiple`: all sizes are multiples of it; devices share a step's tokens evenly. `scheme_of`: how they best share the
    attention of a prompt of so many tokens, if not as they share that of any rows.
    """
    decode = [*_doubling(1, max_num_seqs), max_num_seqs]
    # Decodes are never dropped for the budget, so a mixed step may hold max_num_seqs tokens more than it.
    top = max(token_budget, max_num_seqs)
    prefill = [r for r in (16, 64) if r < top] + [*_doubling(256, top), top]
    decode, prefill = ([-(-r // multiple) * multiple for r in rungs] for rungs in (decode, prefill))
    return tuple(
        [Rung(r, r, True) for r in dict.fromkeys(decode)]
        + [Rung(t, min(t, decode[-1]), False) for t in dict.fromkeys(prefill)]
        + [Rung(t, 1, False, scheme) for t in dict.fromkeys(prefill) if (scheme := scheme_of(t))]
    )


def token_rungs(ladder: Iterable[Rung]) -> tuple[int, ...]:
    """The sizes of steps that may hold prompts, ascending: where the scheduler cuts chunks."""
    return tuple(sorted({rung.tokens for rung in ladder if not rung.decode_only}))


def fit(ladder: Iterable[Rung], loads: Sequence[Load]) -> Rung:
    """The smallest rung that holds a step. All replicas run the same one, so it must hold the fullest."""
    num_tokens = max(load.num_tokens for load in loads)
    num_rows = max(load.num_rows for load in loads)
    decode_only = all(load.num_tokens == load.num_rows for load in loads)
    is_prompt = all(load.is_prompt for load in loads)

    def takes(rung: Rung) -> bool:
        is_right_kind = (decode_only or not rung.decode_only) and (is_prompt or rung.scheme is None)
        return is_right_kind and rung.tokens >= num_tokens and rung.rows >= num_rows

    return min(filter(takes, ladder), key=lambda r: (r.tokens, r.rows, not r.decode_only, r.scheme is None))


def _doubling(start: int, stop: int) -> Iterable[int]:
    while start < stop:
        yield start
        start *= 2
