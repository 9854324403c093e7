"""The formula, in float32."""

import jax.numpy as jnp


def matmul(x_ti, w_oi, out_dtype):
    """See `op.matmul`."""
    out_to = jnp.einsum("ti,oi->to", x_ti.astype(jnp.float32), w_oi.astype(jnp.float32), precision="highest")
    return out_to.astype(out_dtype)
