"""Block sizes of the TPU kernels. By rule so far, from the compiler's schedules (`scripts/kernel_report.py`): no timing on a
chip has been made."""

from pathlib import Path

import jax
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.tuning import Table

table = Table(Path(__file__).with_name("tuned.json"))

_BUFFER_BYTES = (
    2 << 20
)  # large enough that one copy hides the latency of the next, small enough for two in 16 MB of VMEM


@table
def query_tile() -> int:
    """Tokens in a block, for rows with several queries. With 64, keys are read twice as often: v6e then waits for HBM."""
    return 128


@table
def chunk(token_bytes: int, *, is_decode: bool) -> int:
    """Keys in a buffer, when each with its value takes so many bytes over the heads that are copied together.

    Longer chunks of a prefill rescale sums less often (512 -> 1024 keys: 0.54 -> 0.84 of v5e's matrix rate, in bundles), but
    more of the last one is masked.
    """
    return min(max(_BUFFER_BYTES // token_bytes, 128), 2048 if is_decode else 1024)


def vmem_bytes() -> int:
    """What a kernel may use of the VMEM of the chip that is compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    on_chip = device is not None or jax.default_backend() == "tpu"
    return pltpu.get_tpu_info().vmem_capacity_bytes * 3 // 4 if on_chip else 64 << 20
