"""A loop over tiles of rows, each of one group, so that the cost follows the groups that have rows.

The number of tiles is known only at run time. A tile may reach into the rows of later groups; their own tiles come later
and write over what it left there.
"""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.grouped_matmul import tiles

_FEWEST, _MOST = 8, 64  # rows of a tile


def grouped_matmul(x_mi, w_xoi, sizes_x, out_dtype):
    """See `op.grouped_matmul`."""
    (num_rows, size), (num_groups, width, _) = x_mi.shape, w_xoi.shape
    tile = _tile(num_rows, num_groups)
    x_mi = jnp.pad(x_mi, ((0, tile), (0, 0)))  # for the last tile
    table = tiles.cut(sizes_x, num_rows, tile)

    def multiply(index, out_mo):
        row = table.row_j[index]
        rows_ri = jax.lax.dynamic_slice(x_mi, (row, 0), (tile, size))
        return jax.lax.dynamic_update_slice(out_mo, _product(rows_ri, _weight(w_xoi, table.group_j[index])), (row, 0))

    # In float32: XLA on CPU updates a narrower array by converting all of it and back.
    out_mo = jnp.zeros((num_rows + tile, width), jnp.float32)
    out_mo = jax.lax.fori_loop(0, table.number, multiply, out_mo)
    return out_mo[:num_rows].astype(out_dtype)


def _tile(num_rows: int, num_groups: int) -> int:
    """Rows of a tile: about as many as a group has if all have the same. A half empty tile costs as much as a full one."""
    return min(max(_FEWEST, 1 << (num_rows // num_groups).bit_length()), _MOST)


def _product(rows_ri, w_oi):
    """`rows @ w.T`. XLA packs the right factor of float32 on every call, so that is better the small one."""
    if rows_ri.dtype == jnp.float32:
        w_or = jax.lax.dot_general(w_oi, rows_ri, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return jax.lax.optimization_barrier(w_or).T
    return jax.lax.dot_general(rows_ri, w_oi, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _weight(w_xoi, group):
    """One group's weight. To slice narrow floats XLA on CPU converts all of the array to float32, before the loop:
    that costs ten times the loop. Bits it slices as they are. The barrier keeps this inside of the loop."""
    if w_xoi.dtype == jnp.float32:
        return jax.lax.dynamic_index_in_dim(w_xoi, group, 0, keepdims=False)
    w_xoi, group = jax.lax.optimization_barrier((w_xoi, group))
    bits_xoi = jax.lax.bitcast_convert_type(w_xoi, jnp.dtype(f"uint{8 * w_xoi.dtype.itemsize}"))
    bits_oi = jax.lax.dynamic_index_in_dim(bits_xoi, group, 0, keepdims=False)
    return jax.lax.bitcast_convert_type(bits_oi, w_xoi.dtype)
