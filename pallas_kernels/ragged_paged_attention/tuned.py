"""Block sizes of the kernels: those in `tuned.json`, found by `scripts/tune_kernels.py`, and else by rules that follow
the compilers' schedules (`scripts/kernel_report.py`, `cubin.py`). No timing on a chip has been made."""

from pathlib import Path
from typing import NamedTuple

from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.platform import target_platform
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
def block(num_queries: int, *, is_decode: bool) -> int:
    """Queries whose scores of a chunk are worked on together.

    By the schedule, the rows of one matrix unit of 128 x 128, or twice those of one of 256 x 256: fewer load its stationary
    factor too often, more spill the running sums.
    """
    if is_decode:
        return num_queries
    width = pltpu.get_tpu_info().mxu_column_size if is_for_chip() else 128
    sizes = (width,) if width == 128 else (2 * width, width)
    # A tile with few tokens, or a group that is no power of two, may be taken whole.
    return next((size for size in sizes if num_queries % size == 0), num_queries)


def is_for_chip() -> bool:
    """Whether a TPU is compiled for, and can be asked for its sizes."""
    return target_platform() == "tpu"


def vmem_bytes() -> int:
    """What a kernel may use of the VMEM of the chip that is compiled for."""
    return pltpu.get_tpu_info().vmem_capacity_bytes * 3 // 4 if is_for_chip() else 64 << 20


_HOPPER_SMEM = 227 << 10  # bytes of shared memory that one program may have
_HOPPER_PROCESSORS = 132


@table
def gpu_blocks(head_size: int, *, is_decode: bool) -> tuple[int, int, int]:
    """For Mosaic GPU: warpgroups that multiply, keys in a buffer, buffers; of 16-bit numbers.

    A decode waits for memory: many small buffers. A block of a prompt waits for the tensor cores: two warpgroups share what
    is copied, or L2 would be too slow (64 queries do 128 FLOPs with each byte of a chunk; H100 has 180 for each byte of L2).
    """
    num_workers, chunk = (1, 64) if is_decode else (2, 64 if head_size > 128 else 128)
    row_bytes = 2 * head_size
    sums = 64 * 4 * (128 if head_size % 128 == 0 else head_size) if is_decode else 0  # of parts, in float32
    outside = num_workers * 64 * row_bytes + sums + (8 << 10)
    return num_workers, chunk, min((_HOPPER_SMEM - outside) // (chunk * 2 * row_bytes), 5 if is_decode else 2)


@table
def gpu_parts(num_programs: int, most_keys: int) -> int:
    """Into how many parts the context of each decode is cut: for two programs on each processor, but no part so short that
    its start (about 2 us, in which a processor copies 50 kB) weighs more than its work."""
    wanted = -(-2 * _HOPPER_PROCESSORS // num_programs)
    return max(min(wanted, most_keys // 512, 64), 1)


class TritonBlock(NamedTuple):
    """How one program of a Triton kernel works."""

    queries: int  # query rows of one KV head
    keys: int  # in a chunk
    num_warps: int
    num_stages: int  # chunks in flight


@table
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
    # Factors and sums of Hopper's and Blackwell's products take fewer registers.
    accumulates_apart = 90 <= capability < 120
    keys = 64 if width <= 64 or (width <= 128 and accumulates_apart) else 32
    return TritonBlock(max(group, queries), keys, 8, 3)


@table
def triton_least_split(keys: int) -> int:
    """Fewest keys in a split of a decode's context, when a chunk has so many."""
    return 4 * keys


@table
def triton_splits(num_cores: int, num_kv_heads: int) -> int:
    """Splits over all decodes: with the KV heads, four programs for each of a chip's cores."""
    return -(-4 * num_cores // num_kv_heads)
