"""Rows of groups cut into tiles, so that each tile has one weight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """Tiles that follow each other. There is room for as many as there can be; those past `number` are of no group."""

    group_j: jax.Array  # i32
    row_j: jax.Array  # i32, the first
    end_j: jax.Array  # i32, the end of the group's rows
    number: jax.Array  # i32


def cut(sizes_x: jax.Array, num_rows: int, rows: int) -> Tiles:
    """Tiles of `rows` rows, of groups of `sizes_x` rows; every group begins a new one."""
    num_groups = len(sizes_x)
    most = num_rows // rows + min(num_groups, num_rows)
    tiles_x = -(-sizes_x // rows)
    last_row_x, last_tile_x = jnp.cumsum(sizes_x), jnp.cumsum(tiles_x)
    index_j = jnp.arange(most, dtype=jnp.int32)
    group_j = jnp.searchsorted(last_tile_x, index_j, side="right", method="compare_all").astype(jnp.int32)
    own_j = jnp.minimum(group_j, num_groups - 1)
    row_j = last_row_x[own_j] - sizes_x[own_j] + (index_j - last_tile_x[own_j] + tiles_x[own_j]) * rows
    return Tiles(group_j, row_j.astype(jnp.int32), last_row_x[own_j].astype(jnp.int32), last_tile_x[-1])
