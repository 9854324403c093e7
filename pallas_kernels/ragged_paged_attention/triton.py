"""Triton for NVIDIA GPUs, called through jax-triton: the backend for what Mosaic GPU does not take, such as older chips,
float32, narrow pools and odd head sizes. One device; nothing here knows of a mesh.

Up to four launches, in `triton_kernels.py`: new keys and values are written into their slots; rows with several queries are
attended in tiles of tokens; rows with one query have their context cut into splits, so that few long rows fill a chip too;
and the parts of rows with several splits are merged. How many splits a row has follows from the lengths, which only the
device knows: all rows' keys are shared out evenly. The grid is as large as it can become; programs past the end return.

`attend_on` takes the chip and the function that launches, so that the same plan can be interpreted (tests), compiled without
a GPU (`triton_ahead.py`), or run.

Source: splits and their merging, https://crfm.stanford.edu/2023/10/12/flashdecoding.html (Flash-Decoding).
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.pallas_kernels.ragged_paged_attention import tuned
from jaxserve.pallas_kernels.ragged_paged_attention.signature import Attended, Extras, Options, Rows, dot_dtype, to_pool
from jaxserve.pallas_kernels.triton_gpu import Chip, chip_here, jax_triton, refusal

_LEAST_ROWS = 64  # calls with fewer rows share their compiled kernels
_MERGED = 16  # parts of a row that are read at once
_WRITTEN = 4096  # numbers that one program of the writing kernel copies


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is fixed when a kernel is compiled. Padded numbers are powers of two."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    page_size: int
    rows: int  # of the call, padded
    dot_dtype: str  # of the factors of both products
    kv_dtype: str  # of what the pool holds; its array type may be of bits
    has_float8: bool  # whether the chip converts float8_e4m3fn
    scale: float
    window: int  # 0 for none
    soft_cap: float  # 0 for none
    has_sinks: bool
    has_scale: bool
    wants_lse: bool
    queries: int = 1  # query rows of one KV head in a tile, padded
    keys: int = 1  # in a chunk
    splits: int = 1  # wanted over all rows; a row has at most so many
    least: int = 1  # keys in a split

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def tokens(self) -> int:
        """Tokens in a tile."""
        return max(self.queries // self.group, 1)

    @property
    def width(self) -> int:
        """Head size, padded."""
        return _padded(self.head_size)

    @property
    def is_head_padded(self) -> bool:
        """Whether the head size is no power of two."""
        return self.width != self.head_size

    @property
    def is_chunk_in_page(self) -> bool:
        """Whether all keys of a chunk lie in one page."""
        return self.keys <= self.page_size

    @property
    def slot_stride(self) -> int:
        """Numbers from one slot of a page to the next: a key and its value."""
        return 2 * self.head_size

    @property
    def head_stride(self) -> int:
        """Numbers from one head of a page to the next."""
        return self.page_size * self.slot_stride

    @property
    def page_stride(self) -> int:
        """Numbers in a page."""
        return self.num_kv_heads * self.head_stride

    @property
    def token_stride(self) -> int:
        """Numbers that a new token brings."""
        return self.num_kv_heads * self.slot_stride

    @property
    def heads(self) -> int:
        """KV heads that one program of the writing kernel copies, padded."""
        return min(_padded(self.num_kv_heads), max(_WRITTEN // (2 * self.width), 1))

    @property
    def splits_padded(self) -> int:
        """Most splits of a row, padded."""
        return max(_padded(self.splits), _MERGED)

    @property
    def merged(self) -> int:
        """Parts of a row that are read at once."""
        return _MERGED


class Launch(NamedTuple):
    """One kernel of `triton_kernels.py`. Its arguments are arrays, integers, results, and `shape`."""

    kernel: str
    grid: tuple[int, ...]
    shape: Shape
    num_warps: int
    num_stages: int


# Runs a launch on (arrays, integers); the last `updated` arrays are updated in place and returned, new ones as named follow.
Call = Callable[[Launch, Sequence[jax.Array], Sequence[int], int, Sequence[jax.ShapeDtypeStruct]], Sequence[jax.Array]]


def attend(q_tnh, k_tkh, v_tkh, pages_pkbd, rows: Rows, extras: Extras, options: Options) -> Attended:
    """See `op.ragged_paged_attention`."""
    reason, chip = refusal(), chip_here()
    if reason or chip is None:
        raise NotImplementedError(reason)
    return attend_on(
        chip, functools.partial(run, chip.capability), q_tnh, k_tkh, v_tkh, pages_pkbd, rows, extras, options
    )


def attend_on(
    chip: Chip, call: Call, q_tnh, k_tkh, v_tkh, pages_pkbd, rows: Rows, extras: Extras, options: Options
) -> Attended:
    """Attend with launches made for a chip, run by `call`."""
    _refuse(options)
    num_tokens, num_heads, head_size = q_tnh.shape
    num_rows, table_width = rows.table_sm.shape
    shape = _shape(chip, q_tnh, pages_pkbd, rows, extras, options)
    table_sm, q_start_s, kv_len_s = (x.astype(jnp.int32) for x in rows)

    # Old chips know no float8, and it has no zero to load in place of what is masked: bits, which costs no copy.
    stored = jnp.dtype("uint8") if str(options.kv_dtype).startswith("float8") else pages_pkbd.dtype
    new_tkd = lax.bitcast_convert_type(to_pool(k_tkh, v_tkh, options.kv_dtype, extras.kv_scale_2k), stored)
    lengths = (q_start_s, kv_len_s)
    (pages,) = call(
        Launch("write_pages", (num_tokens, -(-shape.num_kv_heads // shape.heads)), shape, 4, 1),
        (new_tkd, table_sm, *lengths, lax.bitcast_convert_type(pages_pkbd, stored)),
        (num_rows, table_width),
        1,
        (),
    )

    # What is absent stands as any array: a kernel compiled without it does not look.
    sinks_n = kv_len_s if extras.sinks_n is None else extras.sinks_n.astype(jnp.float32)
    kv_scale_2k = kv_len_s if extras.kv_scale_2k is None else extras.kv_scale_2k.astype(jnp.float32)
    inputs = (q_tnh, pages, table_sm, *lengths, sinks_n, kv_scale_2k)
    # What no launch visits stays zero.
    results = (jnp.zeros_like(q_tnh), jnp.zeros((num_tokens if options.wants_lse else 1, num_heads), jnp.float32))
    if options.max_q_len != 1:
        launch = _tiles(chip, shape, num_tokens, num_rows)
        results = call(launch, (*inputs, *results), (num_rows, table_width), 2, ())
    launch = _decodes(chip, shape, num_rows, table_width)
    num_parts = launch.grid[1] if launch.shape.splits > 1 else 1
    parts = (
        jax.ShapeDtypeStruct((num_parts, num_heads, head_size), jnp.float32),
        jax.ShapeDtypeStruct((num_parts, num_heads), jnp.float32),
    )
    *results, part_xnh, part_xn = call(launch, (*inputs, *results), (num_rows, table_width), 2, parts)
    if launch.shape.splits > 1:
        merge = Launch("merge_splits", (num_rows, num_heads), launch.shape, 2, 2)
        results = call(merge, (part_xnh, part_xn, *lengths, *results), (num_rows,), 2, ())
    out_tnh, lse_tn = results
    pages = lax.bitcast_convert_type(pages, pages_pkbd.dtype)
    return Attended(out_tnh, pages, lse_tn if options.wants_lse else None)


def _refuse(options: Options) -> None:
    if not options.scale > 0:
        raise NotImplementedError("only scales above 0")
    if options.kv_dtype.itemsize == 1 and str(options.kv_dtype) not in ("int8", "float8_e4m3fn", "float8_e5m2"):
        raise NotImplementedError(f"no pool of {options.kv_dtype}")


def _shape(chip: Chip, q_tnh, pages_pkbd, rows: Rows, extras: Extras, options: Options) -> Shape:
    """What all launches of a call have in common."""
    return Shape(
        num_heads=q_tnh.shape[1],
        num_kv_heads=pages_pkbd.shape[1],
        head_size=q_tnh.shape[2],
        page_size=pages_pkbd.shape[2],
        rows=max(_padded(len(rows.kv_len_s)), _LEAST_ROWS),
        dot_dtype=_dot_dtype(chip, q_tnh.dtype, options.kv_dtype),
        kv_dtype=str(options.kv_dtype),
        has_float8=chip.capability >= 89,
        scale=float(options.scale),
        window=options.window or 0,
        soft_cap=float(options.soft_cap or 0),
        has_sinks=extras.sinks_n is not None,
        has_scale=extras.kv_scale_2k is not None,
        wants_lse=options.wants_lse,
    )


def _dot_dtype(chip: Chip, dtype: jnp.dtype, kv_dtype: jnp.dtype) -> str:
    """Of the factors of both products.

    As everywhere, but for two: float16 where neither queries nor pool hold more, because GPUs multiply it as fast as
    bfloat16; and float32 before Ampere, whose matrix units know no bfloat16, and are left idle by Triton (3.9) for float16.
    """
    if chip.capability < 80:
        return "float32"
    if dtype == jnp.float16 and (kv_dtype == jnp.float16 or kv_dtype.itemsize == 1):
        return "float16"
    return str(dot_dtype(dtype, kv_dtype))


def _tiles(chip: Chip, shape: Shape, num_tokens: int, num_rows: int) -> Launch:
    """Rows with several queries. There are at most so many tiles: each row's last may be short."""
    block = _block(chip, shape, is_decode=False)
    shape = dataclasses.replace(shape, queries=block.queries, keys=block.keys)
    most = num_tokens // shape.tokens + min(num_rows, num_tokens)
    return Launch("attend_tiles", (most, shape.num_kv_heads), shape, block.num_warps, block.num_stages)


def _decodes(chip: Chip, shape: Shape, num_rows: int, table_width: int) -> Launch:
    """Rows with one query. A split holds an even share of all keys or more, so only each row's last can be one too many."""
    block = _block(chip, shape, is_decode=True)
    least = tuned.triton_least_split(block.keys)
    wanted = tuned.triton_splits(chip.num_cores, shape.num_kv_heads)
    splits = wanted if table_width * shape.page_size > least else 1
    shape = dataclasses.replace(shape, queries=block.queries, keys=block.keys, splits=splits, least=least)
    most = num_rows + splits if splits > 1 else num_rows
    return Launch("attend_decodes", (shape.num_kv_heads, most), shape, block.num_warps, block.num_stages)


def _block(chip: Chip, shape: Shape, *, is_decode: bool) -> tuned.TritonBlock:
    return tuned.triton_block(
        chip.capability, shape.dot_dtype, shape.kv_dtype, _padded(shape.group), shape.width, is_decode=is_decode
    )


def _padded(n: int) -> int:
    """The power of two from n on."""
    return 1 << max(n - 1, 0).bit_length()


def kernel(launch: Launch) -> Any:
    """The `triton.jit` function of a launch."""
    kernels = importlib.import_module("jaxserve.pallas_kernels.ragged_paged_attention.triton_kernels")
    return getattr(kernels, launch.kernel)


def run(capability: int, launch: Launch, arrays, integers, updated: int, created):
    """`Call` for a GPU of a compute capability."""
    first = len(arrays) - updated
    return jax_triton().triton_call(
        *arrays,
        *integers,
        kernel=kernel(launch),
        out_shape=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[first:]), *created],
        grid=launch.grid,
        name=launch.kernel,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        compute_capability=capability,
        input_output_aliases={first + i: i for i in range(updated)},
        shape=launch.shape,
    )
