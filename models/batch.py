"""The device-side batch of one step: a flat, ragged run of tokens and the rows they belong to.

Tokens of row `s` are `q_start_s[s] : q_start_s[s + 1]`; they are the last `q_len` tokens of a sequence that is
`kv_len_s[s]` tokens long once they are written. Prefill, chunk and decode differ only in `q_len`.
"""

from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

T = TypeVar("T")  # what the tree holds: arrays of NumPy or JAX, shapes, ...


@struct.dataclass
class TokenBatch(Generic[T]):
    """Padding: tokens past `q_start_s[-1]` belong to no row; empty rows have q_len 0 and kv_len 0."""

    ids_t: T  # i32[t]
    q_start_s: T  # i32[s + 1]
    kv_len_s: T  # i32[s]; this step's tokens included
    table_sm: T  # i32[s m]; block ids, read only up to ceil(kv_len / block size)
    max_q_len: int | None = struct.field(pytree_node=False, default=None)  # 1: every row is a decode; None: any
    # How devices share attention (`sharding.scheme`) when there is but one row, from its beginning; None: any rows.
    scheme: str | None = struct.field(pytree_node=False, default=None)


def positions(batch: TokenBatch[jax.Array]) -> jax.Array:
    """Position of every token in its sequence, i32[t]; 0 for padding."""
    num_rows = batch.kv_len_s.shape[0]
    index_t = jnp.arange(batch.ids_t.shape[0], dtype=jnp.int32)
    row_t = jnp.searchsorted(batch.q_start_s, index_t, side="right").astype(jnp.int32) - 1
    row_t = jnp.minimum(row_t, num_rows - 1)
    pos_t = batch.kv_len_s[row_t] - (batch.q_start_s[row_t + 1] - index_t)
    return jnp.where(index_t < batch.q_start_s[-1], pos_t, 0)


def is_real(batch: TokenBatch[jax.Array]) -> jax.Array:
    """Which tokens belong to a row, bool[t]; the others are padding."""
    return jnp.arange(batch.ids_t.shape[0], dtype=jnp.int32) < batch.q_start_s[-1]


def last_tokens(batch: TokenBatch[jax.Array]) -> jax.Array:
    """Index of every row's last token, i32[s]; of an empty row, that of the row before it."""
    return jnp.maximum(batch.q_start_s[1:] - 1, 0)
