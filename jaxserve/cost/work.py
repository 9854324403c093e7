"""What one step asks of the device, in a few numbers. Host-only; made for every step of long simulations, so it is quick."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxserve.step import Row

_FEW_ROWS = 4  # as `executor.program`: a step that fills prompts computes the logits of so many rows, or of all


class Work(NamedTuple):
    """One replica's part of a step.

    A row of one token is a decode here, also when it is the last token of a prompt. `pairs` counts for each row of n tokens
    from position `start` on n * start + n * (n + 1) / 2 queries and keys; for a decode that is what it reads.
    """

    rung: int  # tokens computed, padding included
    rows: int
    tokens: int  # without padding
    decode_kv: int = 0  # tokens whose keys and values rows of one token read, themselves included
    chunk_kv: int = 0  # ... and rows of several tokens
    pairs: int = 0  # of all rows
    logit_rows: int = 0  # rows whose logits are computed, padding included

    @property
    def is_decode(self) -> bool:
        """Whether all rows have one token, so that the step runs a rung for decodes."""
        return self.tokens == self.rows


def work_of(rows: Sequence[Row], rung: int, rung_rows: int) -> Work:
    """One replica's rows, run by a compiled step of `rung` tokens in `rung_rows` rows (`executor.ladder.Rung`)."""
    num_rows = len(rows)
    decode_start = chunk_kv = chunk_pairs = chunk_tokens = num_chunks = num_sampling = 0
    for row in rows:
        count = len(row.token_ids) + row.feeds_last
        if count == 1:
            decode_start += row.start
        else:
            start = row.start
            num_chunks += 1
            num_sampling += row.samples
            chunk_tokens += count
            chunk_kv += start + count
            chunk_pairs += count * (2 * start + count + 1) // 2
    num_decodes = num_rows - num_chunks
    decode_kv = decode_start + num_decodes
    few = num_chunks and num_decodes + num_sampling <= _FEW_ROWS
    return Work(
        rung,
        num_rows,
        num_decodes + chunk_tokens,
        decode_kv,
        chunk_kv,
        decode_kv + chunk_pairs,
        min(_FEW_ROWS, rung_rows) if few else rung_rows,
    )


def prompt_work(num_tokens: int, start: int = 0, *, decodes: int = 0, decode_kv: int = 0, rung: int = 0) -> Work:
    """A chunk of a prompt from position `start` on, beside so many decodes that read `decode_kv` tokens together.
    `rung`: the step's size, if padded."""
    pairs = num_tokens * (2 * start + num_tokens + 1) // 2
    tokens = num_tokens + decodes
    return Work(max(rung, tokens), decodes + 1, tokens, decode_kv, start + num_tokens, decode_kv + pairs, decodes + 1)


def decode_work(num_rows: int, kv: int, *, rung: int = 0) -> Work:
    """So many rows of one token that read `kv` tokens together."""
    return Work(max(rung, num_rows), num_rows, num_rows, kv, 0, kv, max(rung, num_rows))
