"""Block sizes of the TPU kernels: those in `tuned.json`, found by `scripts/tune_kernels.py`, and else by rules that follow
the compiler's schedules (`scripts/kernel_report.py`). No timing on a chip has been made."""

from pathlib import Path

import jax
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.tuning import Table

table = Table(Path(__file__).with_name("tuned.json"))

# Large enough that one copy hides the latency of the next, small enough for two in 16 MB of VMEM.
_BUFFER_BYTES = 2 << 20


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
    most = 2048 if is_decode else 1024
    return min(max(_BUFFER_BYTES // token_bytes // 128, 1) * 128, most)


@table
def block(num_queries: int, num_keys: int, *, is_decode: bool) -> tuple[int, int]:
    """Queries and keys of a chunk whose scores are worked on together.

    Smaller ones spill fewer registers, but load the matrix units' stationary factor more often and rescale sums more often.
    """
    if is_decode:
        return num_queries, num_keys
    width = pltpu.get_tpu_info().mxu_column_size if is_for_chip() else 128
    # A tile with few tokens, or a group that is no power of two, is taken whole.
    return width if num_queries % width == 0 else num_queries, min(4 * width, num_keys)


def is_for_chip() -> bool:
    """Whether a TPU is compiled for, and can be asked for its sizes."""
    return jax.sharding.get_abstract_mesh().abstract_device is not None or jax.default_backend() == "tpu"


def vmem_bytes() -> int:
    """What a kernel may use of the VMEM of the chip that is compiled for."""
    return pltpu.get_tpu_info().vmem_capacity_bytes * 3 // 4 if is_for_chip() else 64 << 20
