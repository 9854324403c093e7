"""The formulas, in float32."""

import jax
import jax.numpy as jnp


def matmul(x_ti, w_oi, out_dtype):
    """See `op.matmul`."""
    out_to = jnp.einsum("ti,oi->to", x_ti.astype(jnp.float32), w_oi.astype(jnp.float32), precision="highest")
    return out_to.astype(out_dtype)


def gated_matmul(x_ti, w_oi, bias_o):
    """See `op.gated_matmul`."""
    gate_up_to = matmul(x_ti, w_oi, jnp.float32)
    if bias_o is not None:
        gate_up_to = gate_up_to + bias_o.astype(jnp.float32)[None, :]
    gate_tf, up_tf = jnp.split(gate_up_to, 2, axis=-1)
    return (jax.nn.silu(gate_tf) * up_tf).astype(x_ti.dtype)
