"""What a kernel walks over: pieces of rows, listed on the device because the lengths are only known there."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.platform import target_platform


def row_of(index_i: jax.Array, end_s: jax.Array) -> jax.Array:
    """i32[i]; the row in which each place of an axis lies, when rows end at `end_s`, ascending; at most the last one."""
    # A search is a loop of several launches; beside a GPU's kernels, and a TPU's, comparing with every end costs less.
    method = "scan" if target_platform() == "cpu" else "compare_all"
    row_i = jnp.searchsorted(end_s, index_i, side="right", method=method)
    return jnp.minimum(row_i, len(end_s) - 1).astype(jnp.int32)


def tiles(begin_s: jax.Array, end_s: jax.Array, size: int, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row and block of each tile, when row s has [begin, end) of an axis cut into blocks of a size; and how many.

    Returns: i32[most], i32[most], i32[]. Entries past the last tile hold its row, or that of any.
    """
    first_s = begin_s // size
    count_s = jnp.where(end_s > begin_s, (end_s - 1) // size - first_s + 1, 0)
    last_s = jnp.cumsum(count_s)
    index_i = jnp.arange(most, dtype=jnp.int32)
    row_i = row_of(index_i, last_s)
    block_i = first_s[row_i] + index_i - (last_s[row_i] - count_s[row_i])
    return row_i, block_i.astype(jnp.int32), last_s[-1].astype(jnp.int32)
