"""Block sizes of the TPU kernels. By rule so far: no timing on a chip has been made."""

import jax
from jax.experimental.pallas import tpu as pltpu

_BUFFER_BYTES = (
    2 << 20
)  # large enough that one copy hides the latency of the next, small enough for two in 16 MB of VMEM


def query_tile() -> int:
    """Tokens in a block, for rows with several queries."""
    return 128


def chunk(token_bytes: int) -> int:
    """Keys in a buffer, when each with its value takes so many bytes over the heads that are copied together."""
    return min(max(_BUFFER_BYTES // token_bytes, 128), 512)


def vmem_bytes() -> int:
    """What a kernel may use of the VMEM of the chip that is compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    on_chip = device is not None or jax.default_backend() == "tpu"
    return pltpu.get_tpu_info().vmem_capacity_bytes * 3 // 4 if on_chip else 64 << 20
