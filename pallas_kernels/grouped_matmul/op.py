"""Products of groups of rows, each with a weight of its own: what a mixture of experts computes."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.dispatch import dispatch, tried
from jaxserve.pallas_kernels.grouped_matmul import cpu, ref, triton, xla

IMPLEMENTATIONS = {
    "cpu": cpu.grouped_matmul,
    "triton": triton.grouped_matmul,
    "xla": xla.grouped_matmul,
    "ref": ref.grouped_matmul,
}
ORDER = {"tpu": ("xla",), "gpu": ("triton", "xla"), "cpu": ("cpu",)}  # what is tried, by platform


def grouped_matmul(
    x_mi: Float[Array, "m i"],
    w_xoi: Float[Array, "x o i"],
    sizes_x: Int[Array, " x"],
    out_dtype: DTypeLike = jnp.float32,
    *,
    impl: str | None = None,
) -> Float[Array, "m o"]:
    """`rows @ w[x].T` for the rows of every group x, summed in float32.

    Args:
      x_mi: the rows of the first group, then those of the second, and so on; then rows of no group, which may be anything
        (not a number included). Of w's dtype.
      sizes_x: i32, rows of each group; any may be 0. Their sum is at most m.
      out_dtype: what the sums are rounded to (static).
      impl: "cpu" (a loop over the groups that have rows), "triton" (NVIDIA GPUs, through jax-triton), "xla"
        (`jax.lax.ragged_dot_general`), "ref", or None for the first that takes the case on this platform (static).

    Returns: the products; rows of no group are unspecified, and may be not a number.
    """
    implementations = tried(IMPLEMENTATIONS, ORDER, impl)
    return dispatch("grouped_matmul", implementations, impl, x_mi, w_xoi, sizes_x, jnp.dtype(out_dtype))


__all__ = ["IMPLEMENTATIONS", "grouped_matmul"]
