"""The memory of TPUs: what their kernels of this folder share."""

import jax.numpy as jnp

LANES = 128  # of a vector register


def slots_of_tile(dtype: jnp.dtype) -> int:
    """Tokens of a page that lie in one memory tile, the least that can be written."""
    return 32 // dtype.itemsize


def where(condition, x, y):
    """`jnp.where` for narrow numbers too, which the chip cannot select by a mask of another width."""
    if x.dtype.itemsize == 4:
        return jnp.where(condition, x, y)
    return jnp.where(condition, x.astype(jnp.float32), y.astype(jnp.float32)).astype(x.dtype)
