"""The few building blocks every decoder shares. All take and return plain arrays."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.matmul.op import matmul
from jaxserve.sharding.collectives import num_shards, sum_over, take


def linear(x_ti: Float[Array, "t i"], w_oi: Float[Array, "o i"], bias_o: Float[Array, " o"] | None = None) -> jax.Array:
    """`x @ w.T + bias`, accumulated in float32, returned in the input's dtype. Weights are kept `[out, in]`."""
    if bias_o is None:
        return matmul(x_ti, w_oi, x_ti.dtype)
    return (matmul(x_ti, w_oi) + bias_o.astype(jnp.float32)[None, :]).astype(x_ti.dtype)


def joined_linear(
    x_ti: Float[Array, "t i"], w_oi: Float[Array, "o i"], bias_o: Float[Array, " o"] | None, *, over: str
) -> jax.Array:
    """`linear` of inputs that devices share by the logical axis `over`: each has its columns of `w`, and all get the sum."""
    if bias_o is None or num_shards(over) == 1:
        return sum_over(over, linear(x_ti, w_oi, bias_o))
    return sum_over(over, linear(x_ti, w_oi)) + bias_o[None, :]


def rms_norm(x: Float[Array, "*rest e"], weight_e: Float[Array, " e"], eps: float) -> Float[Array, "*rest e"]:
    """Root-mean-square norm over the last axis, in float32. Source: arXiv 1910.07467."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + jnp.float32(eps))
    shape = (1,) * (x.ndim - 1) + weight_e.shape
    return (x32 * scale).astype(x.dtype) * weight_e.reshape(shape)


def embed(ids_t: Int[Array, " t"], table_ve: Float[Array, "v e"]) -> Float[Array, "t e"]:
    """Rows of the embedding table; ids are trusted to lie in the vocabulary (checked when a request is made)."""
    return take("vocab", table_ve, ids_t)
