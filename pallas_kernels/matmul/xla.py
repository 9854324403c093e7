"""XLA's own product. On CPU it has slow cases, which are asked for in another way."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.platform import precision_of, target_platform

_FEW_ROWS = 128  # up to so many float32 rows, w is better the left factor


def matmul(x_ti, w_oi, out_dtype):
    """See `op.matmul`. Always summed in float32 and then cast: XLA on CPU is slow to sum into a narrow float."""
    product = _on_cpu if target_platform() == "cpu" else _product
    return product(x_ti, w_oi).astype(out_dtype)


def gated_matmul(x_ti, w_oi, bias_o):
    """See `op.gated_matmul`. The sigmoid is a tanh, which XLA on CPU computes a third faster than the exponential."""
    gate_up_to = matmul(x_ti, w_oi, x_ti.dtype if bias_o is None else jnp.float32)
    if bias_o is not None:
        gate_up_to = (gate_up_to + bias_o.astype(jnp.float32)[None, :]).astype(x_ti.dtype)
    gate_tf, up_tf = jnp.split(gate_up_to, 2, axis=-1)
    half_tf = 0.5 * gate_tf.astype(jnp.float32)
    return (half_tf + half_tf * jnp.tanh(half_tf)).astype(gate_tf.dtype) * up_tf


def _on_cpu(x_ti, w_oi):
    num_rows = x_ti.shape[0]
    if x_ti.dtype != jnp.float32 and num_rows == 1:
        # XLA has no kernel for one narrow-float row, and would first convert the whole weight to float32 (13 ms against
        # 1 ms for a 9728 x 896 bfloat16 weight).
        return _product(jnp.concatenate([x_ti, x_ti]), w_oi)[:1]
    if x_ti.dtype == jnp.float32 and 1 < num_rows <= _FEW_ROWS:
        # XLA packs the right factor on every call, so that is better the small one (8 rows: 1.4 ms against 2.7 ms).
        # Without the barrier it would move the transposition into the product, and be back where it was.
        return jax.lax.optimization_barrier(_product(w_oi, x_ti)).T
    return _product(x_ti, w_oi)


def _product(a_mi, b_ni):
    return jax.lax.dot_general(
        a_mi, b_ni, (((1,), (1,)), ((), ())), precision=precision_of(a_mi.dtype), preferred_element_type=jnp.float32
    )
