"""Pallas for TPU, in two kernels: `tpu_write.py` stores new keys and values, `tpu_attend.py` attends to prompts and decodes.

Both walk a list of *tiles*, made on the device from the lengths of the rows. A tile is what one row has in one block of an
axis: for writing, the axis is the row's own positions, cut where the memory tiles of a page end; for attending it is the
axis of all tokens, so that queries and results are plain blocks which several rows may share. A decode's block is one token.
Rows with one query and rows with more are attended in two calls of the kernel, cut differently (`shape_of`).

Source: the list of tiles is that of grouped matrix products, arXiv 2211.15841.
"""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.ragged_paged_attention import tpu_attend, tpu_write, tuned
from jaxserve.pallas_kernels.ragged_paged_attention.signature import Attended, Extras, Options, Rows, dot_dtype, to_pool
from jaxserve.pallas_kernels.ragged_paged_attention.tpu_memory import LANES, slots_of_tile

_MAX_TABLE_BYTES = 768 << 10  # of the 1 MB of SMEM; the rest is for lengths and tiles


def attend(q_tnh, k_tkh, v_tkh, pages_pkbd, rows: Rows, extras: Extras, options: Options) -> Attended:
    """See `op.ragged_paged_attention`."""
    _refuse(q_tnh, pages_pkbd, rows, options)
    num_tokens, num_heads, head_size = q_tnh.shape
    num_kv_heads = pages_pkbd.shape[1]
    pages = tpu_write.write(pages_pkbd, to_pool(k_tkh, v_tkh, options.kv_dtype, extras.kv_scale_2k), rows)

    # Keys and values are whole lane tiles, or else both products take them together: zeros in the query leave the values
    # out of the scores, and the half of the sums that belongs to keys is dropped.
    group, width = num_heads // num_kv_heads, _width(head_size)
    padding = -num_tokens % min(tuned.query_tile(), num_tokens)
    q_tkgw = q_tnh.reshape(num_tokens, num_kv_heads, group, head_size)
    q_tkgw = jnp.pad(q_tkgw, ((0, padding), (0, 0), (0, 0), (0, width - head_size)))
    lse_tkgl = jnp.zeros((*q_tkgw.shape[:3], LANES), jnp.float32) if options.wants_lse else None
    sums = tpu_attend.Sums(jnp.zeros_like(q_tkgw), lse_tkgl)  # what no tile visits stays zero
    for is_decode in (False, True):
        if is_decode or options.max_q_len != 1:
            shape = shape_of(q_tnh, pages, rows, options, is_decode=is_decode)
            takes_s = rows.q_len_s == 1 if is_decode else rows.q_len_s > 1
            sums = tpu_attend.attend_tiles(shape, q_tkgw, pages, rows, extras, sums, takes_s)
    out_tnh = sums.out_tkgw[:num_tokens, ..., -head_size:].reshape(q_tnh.shape)
    lse_tn = sums.lse_tkgl[:num_tokens, ..., 0].reshape(num_tokens, num_heads) if options.wants_lse else None
    return Attended(out_tnh, pages, lse_tn)


def _refuse(q_tnh, pages_pkbd, rows: Rows, options: Options) -> None:
    if q_tnh.dtype == jnp.float16:
        raise NotImplementedError("TPUs have no float16")
    refuse_pool(pages_pkbd, options.kv_dtype, rows)


def refuse_pool(pages_pkbd, kv_dtype: jnp.dtype, rows: Rows) -> None:
    """Raise NotImplementedError for a pool or a table that the kernels cannot take."""
    if pages_pkbd.dtype != kv_dtype:
        raise NotImplementedError("not a pool kept as bits")
    if kv_dtype == jnp.float16:
        raise NotImplementedError("TPUs have no float16")
    size = slots_of_tile(kv_dtype)
    if pages_pkbd.shape[2] % size:
        raise NotImplementedError(f"pages of {kv_dtype} must hold a multiple of {size} tokens")
    if rows.table_sm.size * 4 > _MAX_TABLE_BYTES:
        raise NotImplementedError(f"a table of {rows.table_sm.shape} does not fit the chip's scalar memory")


def _width(head_size: int) -> int:
    return head_size if head_size % LANES == 0 else 2 * head_size


def shape_of(q_tnh, pages_pkbd, rows: Rows, options: Options, *, is_decode: bool) -> tpu_attend.Shape:
    """How a call is cut into tiles and chunks. Looks at shapes and dtypes only; asks for the chip that is compiled for."""
    num_tokens, num_q_heads, head_size = q_tnh.shape
    _, num_kv_heads, page_size, double = pages_pkbd.shape
    # Decodes wait for memory: all heads of a page in one copy. Larger tiles wait for arithmetic, and for a place in VMEM.
    shares = 2 if _cores_of_device() == 2 and num_kv_heads % 2 == 0 else 1
    num_parts = shares if is_decode else num_kv_heads
    num_heads = num_kv_heads // num_parts
    tile, group = 1 if is_decode else min(tuned.query_tile(), num_tokens), num_q_heads // num_kv_heads
    chunk = tuned.chunk(num_heads * double * pages_pkbd.dtype.itemsize, is_decode=is_decode)
    chunk = min(chunk, -(-rows.table_sm.shape[1] * page_size // LANES) * LANES)
    chunk_pages = max(chunk // page_size, 1)
    return tpu_attend.Shape(
        tile=tile,
        num_parts=num_parts,
        num_heads=num_heads,
        group=group,
        width=_width(head_size),
        page_size=page_size,
        double=double,
        chunk_pages=chunk_pages,
        block=tuned.block(tile * group, is_decode=is_decode),
        table_width=rows.table_sm.shape[1],
        kv_dtype=pages_pkbd.dtype,
        dot_dtype=dot_dtype(q_tnh.dtype, pages_pkbd.dtype),
        options=options,
    )


def _cores_of_device() -> int:
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.num_cores or 1
    return getattr(jax.devices()[0], "num_cores", 1) or 1
