"""XLA's ragged product. On TPU it is a kernel of tiles that skips empty groups; elsewhere all rows times all weights."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.platform import precision_of

_DIMENSIONS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def grouped_matmul(x_mi, w_xoi, sizes_x, out_dtype):
    """See `op.grouped_matmul`."""
    return jax.lax.ragged_dot_general(
        x_mi, w_xoi, sizes_x, _DIMENSIONS, precision=precision_of(x_mi.dtype), preferred_element_type=jnp.float32
    ).astype(out_dtype)
