"""The product of activations with a weight kept `[out, in]`: most of the arithmetic of a decoder."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxserve.pallas_kernels.dispatch import dispatch
from jaxserve.pallas_kernels.matmul import cpu, ref, xla

IMPLEMENTATIONS = {"cpu": cpu.matmul, "xla": xla.matmul, "ref": ref.matmul}
GATED = {"cpu": cpu.gated_matmul, "xla": xla.gated_matmul, "ref": ref.gated_matmul}


def matmul(
    x_ti: Float[Array, "t i"],
    w_oi: Float[Array, "o i"],
    out_dtype: DTypeLike = jnp.float32,
    *,
    impl: str | None = None,
) -> Float[Array, "t o"]:
    """`x @ w.T`, summed in float32.

    Args:
      x_ti, w_oi: of the same dtype.
      out_dtype: what the sums are rounded to (static).
      impl: "cpu" (our own, bfloat16 with AVX-512), "xla", "ref", or None for the first that takes the case (static).
    """
    return dispatch("matmul", IMPLEMENTATIONS, impl, x_ti, w_oi, jnp.dtype(out_dtype))


def gated_matmul(
    x_ti: Float[Array, "t i"],
    w_oi: Float[Array, "o i"],
    bias_o: Float[Array, " o"] | None = None,
    *,
    impl: str | None = None,
) -> Float[Array, "t half_o"]:
    """`silu(x @ gate.T) * (x @ up.T)` in x's dtype, where w is gate above up. Source: arXiv 2002.05202.

    Implementations round the two products to x's dtype before they are multiplied, or only the result.
    """
    return dispatch("gated_matmul", GATED, impl, x_ti, w_oi, bias_o)


def chosen(dtype: jnp.dtype) -> str:
    """The name of the implementation that large weights of a type take."""
    return "cpu" if dtype == jnp.bfloat16 and not cpu.refusal() else "xla"


__all__ = ["GATED", "IMPLEMENTATIONS", "chosen", "gated_matmul", "matmul"]
