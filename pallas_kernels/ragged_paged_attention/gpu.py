"""Pallas for NVIDIA Hopper (Mosaic GPU): how a call becomes tiles of the kernel in `gpu_attend.py`, and back.

Decodes are tiles of their own: all query heads of one KV head. A long context of few decodes is cut into parts, one program
for each, merged afterwards by their `lse`. Other rows are cut into tiles of up to 128 queries of one head.

Tiles are counted from the first query of a row, and written to an array of their own: a copy to or from shared memory takes
whole boxes, so two rows could not share one. The tokens' order comes back by a gather, which XLA fuses with the merge.

Source: parts of a context, "Flash-Decoding", https://pytorch.org/blog/flash-decoding.
"""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.platform import compute_capability
from jaxserve.pallas_kernels.ragged_paged_attention import tuned
from jaxserve.pallas_kernels.ragged_paged_attention.gpu_attend import TILE_ROWS, WORKER_ROWS, Shape, attend_tiles
from jaxserve.pallas_kernels.ragged_paged_attention.signature import Attended, Extras, Options, Rows, to_pool
from jaxserve.pallas_kernels.ragged_paged_attention.tiles import tiles
from jaxserve.pallas_kernels.ragged_paged_attention.xla import write


def attend(q_tnh, k_tkh, v_tkh, pages_pkbd, rows: Rows, extras: Extras, options: Options) -> Attended:
    """See `op.ragged_paged_attention`."""
    _refuse(q_tnh, pages_pkbd, extras, options)
    num_tokens, num_heads, _ = q_tnh.shape
    pages = write(pages_pkbd, to_pool(k_tkh, v_tkh, options.kv_dtype, extras.kv_scale_2k), rows)
    out_tnh, lse_tn = _decode(q_tnh, pages, rows, options)
    if options.max_q_len != 1:
        is_decode_t = (rows.q_len_s == 1)[rows.of_token(num_tokens)]
        tiles_tnh, tiles_tn = _prefill(q_tnh, pages, rows, options)
        out_tnh = jnp.where(is_decode_t[:, None, None], out_tnh, tiles_tnh)
        lse_tn = jnp.where(is_decode_t[:, None], lse_tn, tiles_tn)
    if extras.sinks_n is not None:  # they only make the denominators larger
        sinks_tn = jnp.broadcast_to(extras.sinks_n.astype(jnp.float32), (num_tokens, num_heads))
        out_tnh = out_tnh * jax.nn.sigmoid(lse_tn - sinks_tn)[..., None]
        lse_tn = jnp.logaddexp(lse_tn, sinks_tn)
    is_token_t = jnp.arange(num_tokens) < rows.q_start_s[-1]
    out_tnh = jnp.where(is_token_t[:, None, None], out_tnh, 0.0).astype(q_tnh.dtype)
    return Attended(out_tnh, pages, lse_tn if options.wants_lse else None)


def _refuse(q_tnh, pages_pkbd, extras: Extras, options: Options) -> None:
    head_size, page_size = q_tnh.shape[2], pages_pkbd.shape[2]
    if (capability := compute_capability()) != "9.0":
        raise NotImplementedError(f"made for compute capability 9.0 (Hopper), not {capability}")
    if q_tnh.dtype not in (jnp.bfloat16, jnp.float16) or options.kv_dtype != q_tnh.dtype:
        raise NotImplementedError(
            f"queries of {q_tnh.dtype} over a pool of {options.kv_dtype}: both must be 16-bit floats"
        )
    if pages_pkbd.dtype != options.kv_dtype:
        raise NotImplementedError("not a pool kept as bits")
    if extras.kv_scale_2k is not None:
        raise NotImplementedError("no scales for a pool of 16-bit floats")
    if head_size % 16 or head_size > 256:
        raise NotImplementedError(f"head size {head_size} is not a multiple of 16, up to 256")
    if page_size < TILE_ROWS:
        raise NotImplementedError(f"pages must hold at least {TILE_ROWS} tokens")
    if (group := q_tnh.shape[1] // pages_pkbd.shape[1]) > WORKER_ROWS:
        raise NotImplementedError(f"{group} query heads per KV head; at most {WORKER_ROWS}")


def _decode(q_tnh, pages, rows: Rows, options: Options) -> tuple[jax.Array, jax.Array]:
    """f32[t n h] and f32[t n] for the tokens of rows with one query; anything for others."""
    num_tokens, num_heads, head_size = q_tnh.shape
    num_rows, num_kv_heads = len(rows.kv_len_s), pages.shape[1]
    group = num_heads // num_kv_heads
    shape = shape_of(q_tnh, pages, rows, options, is_decode=True)
    q_skgh = q_tnh[jnp.minimum(rows.q_start_s[:-1], num_tokens - 1)].reshape(num_rows, num_kv_heads, group, head_size)
    q_skgh = jnp.pad(q_skgh, ((0, 0), (0, 0), (0, shape.box - group), (0, 0)))
    row_s = jnp.arange(num_rows, dtype=jnp.int32)
    used_s = (rows.q_len_s == 1).astype(jnp.int32)
    parts_skwgh, lse_skwg = attend_tiles(q_skgh, pages, rows, row_s, jnp.zeros_like(row_s), used_s, shape)
    lse_skwg = lse_skwg[..., :group]
    lse_skg = jax.nn.logsumexp(lse_skwg, axis=2)
    weight_skwg = jnp.exp(lse_skwg - lse_skg[:, :, None])
    out_skgh = jnp.sum(parts_skwgh[..., :group, :].astype(jnp.float32) * weight_skwg[..., None], axis=2)
    row_t = rows.of_token(num_tokens)
    return out_skgh.reshape(num_rows, num_heads, -1)[row_t], lse_skg.reshape(num_rows, num_heads)[row_t]


def _prefill(q_tnh, pages, rows: Rows, options: Options) -> tuple[jax.Array, jax.Array]:
    """f32[t n h] and f32[t n] for the tokens of rows with several queries; anything for others."""
    num_tokens = q_tnh.shape[0]
    shape = shape_of(q_tnh, pages, rows, options, is_decode=False)
    tile = shape.num_workers * shape.box
    takes_s = rows.q_len_s > 1
    row_i, block_i, count = tiles(
        jnp.zeros_like(rows.q_len_s),
        jnp.where(takes_s, rows.q_len_s, 0),
        tile,
        num_tokens // tile + min(len(rows.kv_len_s), num_tokens),
    )
    used_i = (jnp.arange(len(row_i)) < count).astype(jnp.int32)
    q_tnh = jnp.pad(q_tnh, ((0, -num_tokens % TILE_ROWS), (0, 0), (0, 0)))
    out_inqh, lse_inq = attend_tiles(q_tnh, pages, rows, row_i, block_i, used_i, shape)
    row_t = rows.of_token(num_tokens)
    tiles_s = jnp.where(takes_s, (rows.q_len_s + tile - 1) // tile, 0)
    query_t = jnp.arange(num_tokens, dtype=jnp.int32) - rows.q_start_s[row_t]
    tile_t = jnp.clip((jnp.cumsum(tiles_s) - tiles_s)[row_t] + query_t // tile, 0, len(row_i) - 1)
    out_tnh, lse_tn = out_inqh[tile_t, :, 0, query_t % tile], lse_inq[tile_t, :, 0, query_t % tile]
    return out_tnh.astype(jnp.float32), lse_tn


def shape_of(q_tnh, pages, rows: Rows, options: Options, *, is_decode: bool) -> Shape:
    """What the kernel is compiled for, when it attends a call's decodes or its other rows."""
    (_, num_heads, head_size), (_, num_kv_heads, page_size, _) = q_tnh.shape, pages.shape
    group = num_heads // num_kv_heads
    num_workers, chunk, num_buffers = tuned.gpu_blocks(head_size, is_decode=is_decode)
    num_parts = tuned.gpu_parts(len(rows.kv_len_s) * num_kv_heads, rows.table_sm.shape[1] * page_size)
    return Shape(
        num_workers=num_workers,
        num_parts=num_parts if is_decode else 1,
        box=-(-group // TILE_ROWS) * TILE_ROWS if is_decode else WORKER_ROWS,
        group=group,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        page_size=page_size,
        chunk=chunk,
        num_buffers=num_buffers,
        is_decode=is_decode,
        options=options,
    )
