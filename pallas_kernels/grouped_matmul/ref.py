"""The formula, in float32: every group's product with all rows, of which the group's own are kept."""

import jax.numpy as jnp


def grouped_matmul(x_mi, w_xoi, sizes_x, out_dtype):
    """See `op.grouped_matmul`. Rows of no group are zeros."""
    out_mo = jnp.zeros((x_mi.shape[0], w_xoi.shape[1]), jnp.float32)
    row_m, start = jnp.arange(x_mi.shape[0]), 0
    for group, w_oi in enumerate(w_xoi):
        end = start + sizes_x[group]
        product_mo = jnp.einsum("mi,oi->mo", x_mi.astype(jnp.float32), w_oi.astype(jnp.float32), precision="highest")
        out_mo = jnp.where(((row_m >= start) & (row_m < end))[:, None], product_mo, out_mo)
        start = end
    return out_mo.astype(out_dtype)
