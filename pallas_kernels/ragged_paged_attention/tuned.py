"""Block sizes of the kernels. By rule so far, from what compilers report (`scripts/kernel_report.py`, `cubin.py`): no timing
on a chip has been made."""

from typing import NamedTuple

import jax
from jax.experimental.pallas import tpu as pltpu

_BUFFER_BYTES = (
    2 << 20
)  # large enough that one copy hides the latency of the next, small enough for two in 16 MB of VMEM


def query_tile() -> int:
    """Tokens in a block, for rows with several queries. With 64, keys are read twice as often: v6e then waits for HBM."""
    return 128


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


class TritonBlock(NamedTuple):
    """How one program of a Triton kernel works."""

    queries: int  # query rows of one KV head
    keys: int  # in a chunk
    num_warps: int
    num_stages: int  # chunks in flight


def triton_block(
    capability: int, dot_dtype: str, kv_dtype: str, group: int, width: int, *, is_decode: bool
) -> TritonBlock:
    """For a group of query heads per KV head and a head size, both padded to powers of two.

    As large as the registers allow: the next larger block spills. Converting what the pool holds takes registers too.
    """
    is_converted = kv_dtype != dot_dtype
    if dot_dtype == "float32":  # multiplied outside the matrix units, from registers
        queries = max(group, 16 if width > 128 else 1 if is_decode else 32)
        return TritonBlock(queries, 16, 4 if is_decode and width <= 128 else 8, 1 if is_converted else 2)
    if is_decode:
        return TritonBlock(max(group, 16), 32 if is_converted or width > 128 else 64, 4, 3)
    queries = 64 if is_converted or width > 128 else 128
    accumulates_apart = (
        90 <= capability < 120
    )  # factors and sums of Hopper's and Blackwell's products take fewer registers
    keys = 64 if width <= 64 or (width <= 128 and accumulates_apart) else 32
    return TritonBlock(max(group, queries), keys, 8, 3)


def triton_least_split(keys: int) -> int:
    """Fewest keys in a split of a decode's context, when a chunk has so many."""
    return 4 * keys


def triton_splits(num_cores: int, num_kv_heads: int) -> int:
    """Splits over all decodes: with the KV heads, four programs for each of a chip's cores."""
    return -(-4 * num_cores // num_kv_heads)
