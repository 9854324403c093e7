"""Tiles, of work and of memory: what the TPU kernels of this folder share."""

import jax
import jax.numpy as jnp

LANES = 128  # of a vector register


def tiles(begin_s, end_s, size: int, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cut the range [begin, end) that each row has of an axis where blocks of a size end.

    Returns: i32[most] row and i32[most] block of each tile, in order of rows, and i32[] how many there are.
    """
    first_s = begin_s // size
    count_s = jnp.where(end_s > begin_s, (end_s - 1) // size - first_s + 1, 0)
    last_s = jnp.cumsum(count_s)
    index_i = jnp.arange(most, dtype=jnp.int32)
    row_i = jnp.minimum(jnp.searchsorted(last_s, index_i, side="right"), len(begin_s) - 1).astype(jnp.int32)
    block_i = first_s[row_i] + index_i - (last_s[row_i] - count_s[row_i])
    return row_i, block_i.astype(jnp.int32), last_s[-1].astype(jnp.int32)


def slots_of_tile(dtype: jnp.dtype) -> int:
    """Tokens of a page that lie in one memory tile, the least that can be written."""
    return 32 // dtype.itemsize


def where(condition, x, y):
    """`jnp.where` for narrow numbers too, which the chip cannot select by a mask of another width."""
    if x.dtype.itemsize == 4:
        return jnp.where(condition, x, y)
    return jnp.where(condition, x.astype(jnp.float32), y.astype(jnp.float32)).astype(x.dtype)
