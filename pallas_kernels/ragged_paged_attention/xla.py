"""Plain XLA, made for CPU: loops whose trip counts follow the real lengths, so one compiled step serves every context.

Keys and values are read a chunk at a time and merged by a running maximum. Rows with one query (decodes) go together,
longest first, in groups of `ROWS`; rows with more are cut into tiles of `QUERY_TILE` queries, each reading its chunks once.
Padded table columns and empty rows cost nothing, because no iteration visits them.

A bfloat16 model over a bfloat16 pool multiplies in bfloat16 (twice the speed here); all sums and the softmax are float32.

Two habits keep the pool from being copied. It is carried through every loop and out again: a loop that only read it would
leave two live users of one buffer, and XLA would copy it before the next write. And a pool of narrow floats should be
stored as bits: XLA on CPU converts a whole bfloat16 pool to float32 to update a few rows of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

DECODE_CHUNK = 256  # keys per iteration of decode rows
TILE_CHUNK = 256  # keys per iteration of a tile
ROWS = 8  # decode rows per iteration
QUERY_TILE = 128  # queries of one row per iteration

_MASKED = -1e30  # finite, so that a fully masked chunk yields exp(0) * 0 rather than nan


class _Rows(NamedTuple):
    """What does not change within a call; all but the arrays is static."""

    table_sm: jax.Array
    q_start_s: jax.Array
    q_len_s: jax.Array
    kv_len_s: jax.Array
    kv_dtype: jnp.dtype  # what the pool's bits mean
    dot_dtype: jnp.dtype  # of the factors of both products
    scale: float
    window: int | None
    page_size: int

    def pages_of(self, chunk: int) -> int:
        """Pages per chunk of about so many keys."""
        return min(max(chunk // self.page_size, 1), self.table_sm.shape[1])


class _Softmax(NamedTuple):
    """Running softmax of some queries: maximum, sum of weights, weighted sum of values."""

    top: jax.Array  # f32[... q]
    total: jax.Array  # f32[... q]
    acc: jax.Array  # f32[... q h]


def attend(q_tnh, k_tkh, v_tkh, pages_pk2bh, table_sm, q_start_s, kv_len_s, *, scale, window, max_q_len, kv_dtype):
    """See `op.ragged_paged_attention`."""
    is_narrow = q_tnh.dtype == jnp.bfloat16 and kv_dtype == jnp.bfloat16
    rows = _Rows(
        table_sm=table_sm,
        q_start_s=q_start_s,
        q_len_s=q_start_s[1:] - q_start_s[:-1],
        kv_len_s=kv_len_s,
        kv_dtype=kv_dtype,
        dot_dtype=jnp.dtype(jnp.bfloat16 if is_narrow else jnp.float32),
        scale=scale,
        window=window,
        page_size=pages_pk2bh.shape[3],
    )
    num_tokens, num_heads, head_size = q_tnh.shape
    num_kv_heads = k_tkh.shape[1]
    group = num_heads // num_kv_heads
    q_tkgh = q_tnh.astype(rows.dot_dtype).reshape(num_tokens, num_kv_heads, group, head_size)
    pages = _write(pages_pk2bh, k_tkh, v_tkh, rows)
    out_tkgh, pages = _decode(q_tkgh, pages, rows)
    if max_q_len != 1:
        out_tkgh, pages = _tiles(out_tkgh, q_tkgh, pages, rows)
    return out_tkgh.reshape(q_tnh.shape).astype(q_tnh.dtype), pages


def _row_of_token(rows: _Rows, num_tokens: int):
    """i32[t]; tokens past the last row get the last row."""
    token_t = jnp.arange(num_tokens, dtype=jnp.int32)
    row_t = jnp.searchsorted(rows.q_start_s, token_t, side="right").astype(jnp.int32) - 1
    return jnp.minimum(row_t, rows.kv_len_s.shape[0] - 1)


def _write(pages, k_tkh, v_tkh, rows: _Rows):
    """Put every token's key and value into its slot; padding goes to a page past the pool, and is dropped."""
    num_tokens = k_tkh.shape[0]
    token_t = jnp.arange(num_tokens, dtype=jnp.int32)
    row_t = _row_of_token(rows, num_tokens)
    pos_t = rows.kv_len_s[row_t] - (rows.q_start_s[row_t + 1] - token_t)
    page_t = rows.table_sm[row_t, pos_t // rows.page_size]
    page_t = jnp.where(token_t < rows.q_start_s[-1], page_t, pages.shape[0])
    kv_tk2h = jnp.stack([k_tkh, v_tkh], axis=2).astype(rows.kv_dtype)
    if pages.dtype != rows.kv_dtype:
        kv_tk2h = lax.bitcast_convert_type(kv_tk2h, pages.dtype)
    return pages.at[page_t, :, :, pos_t % rows.page_size, :].set(kv_tk2h, mode="drop")


def _read_chunk(pages, rows: _Rows, row_w, first_page_w, chunk_pages: int, real_wc):
    """Keys and values [w k c h] of one chunk of each row; values that are not real are zero, whatever is stored."""
    _, num_kv_heads, _, page_size, head_size = pages.shape
    flat_xbh = pages.reshape(-1, page_size, head_size)  # [page, kv head, key | value] as one index
    column_wc = first_page_w[:, None] + jnp.arange(chunk_pages, dtype=jnp.int32)[None, :]
    page_wc = rows.table_sm.at[row_w[:, None], column_wc].get(mode="clip")  # a last chunk may reach past the table
    head_k = jnp.arange(num_kv_heads, dtype=jnp.int32)
    index_wkc = (page_wc[:, None, :] * num_kv_heads + head_k[None, :, None]) * 2
    shape = (row_w.shape[0], num_kv_heads, chunk_pages * page_size, head_size)

    def read(index):
        heads = flat_xbh.at[index].get(mode="clip").reshape(shape)
        return lax.bitcast_convert_type(heads, rows.kv_dtype).astype(rows.dot_dtype)

    v = read(index_wkc + 1)
    return read(index_wkc), jnp.where(real_wc[:, None, :, None], v, jnp.zeros_like(v))


def _absorb(state: _Softmax, rows: _Rows, q, k, v, seen) -> _Softmax:
    """Merge one chunk: q [w k q h], k and v [w k c h], seen broadcastable to [w k q c].

    A query that sees nothing of a chunk adds exp(0) weights while its maximum is still `_MASKED`; the first chunk it
    does see shrinks those to exactly zero, so no second mask is needed.
    """
    batch = ((0, 1), (0, 1))
    scores = lax.dot_general(q, k, (((3,), (3,)), batch), preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores * rows.scale, _MASKED)
    top = jnp.maximum(state.top, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - top[..., None]).astype(v.dtype)
    shrink = jnp.exp(state.top - top)
    added = lax.dot_general(weights, v, (((3,), (2,)), batch), preferred_element_type=jnp.float32)
    return _Softmax(
        top=top,
        total=state.total * shrink + jnp.sum(weights, axis=-1, dtype=jnp.float32),
        acc=state.acc * shrink[..., None] + added,
    )


def _empty(shape: tuple[int, ...], head_size: int) -> _Softmax:
    return _Softmax(
        top=jnp.full(shape, _MASKED, jnp.float32),
        total=jnp.zeros(shape, jnp.float32),
        acc=jnp.zeros((*shape, head_size), jnp.float32),
    )


def _result(state: _Softmax):
    return state.acc / jnp.where(state.total > 0, state.total, 1.0)[..., None]


def _first_page(pos, rows: _Rows):
    """The page of the earliest key that a query at `pos` sees."""
    if rows.window is None:
        return jnp.zeros_like(pos)
    return jnp.maximum(pos - (rows.window - 1), 0) // rows.page_size


def _decode(q_tkgh, pages, rows: _Rows):
    """All rows with one query. Returns f32[t k g h], zero for other tokens, and the pool."""
    num_tokens, num_kv_heads, group, head_size = q_tkgh.shape
    num_rows = rows.kv_len_s.shape[0]
    width, chunk_pages = min(ROWS, num_rows), rows.pages_of(DECODE_CHUNK)
    chunk_size = chunk_pages * rows.page_size
    padded = -(-num_rows // width) * width

    first_s = _first_page(rows.kv_len_s - 1, rows)
    span_s = jnp.where(rows.q_len_s == 1, rows.kv_len_s - first_s * rows.page_size, 0)
    order_r = jnp.argsort(-span_s).astype(jnp.int32)  # longest first: rows still active at any chunk are a prefix
    row_r = jnp.pad(order_r, (0, padded - num_rows))
    span_r = jnp.pad(span_s[order_r], (0, padded - num_rows))
    q_rkgh = q_tkgh[jnp.minimum(rows.q_start_s[row_r], num_tokens - 1)]
    offset_c = jnp.arange(chunk_size, dtype=jnp.int32)

    def one_group(chunk, group_index, state: _Softmax, pages) -> _Softmax:
        begin = group_index * width

        def take(x):
            return lax.dynamic_slice_in_dim(x, begin, width)

        def put(whole, part):
            return lax.dynamic_update_slice_in_dim(whole, part, begin, axis=0)

        row_w = take(row_r)
        within_wc = (chunk * chunk_size + offset_c)[None, :]
        seen_wc = within_wc < take(span_r)[:, None]
        if rows.window is not None:
            pos_wc = (first_s[row_w] * rows.page_size)[:, None] + within_wc
            seen_wc = seen_wc & (pos_wc > (rows.kv_len_s[row_w] - 1 - rows.window)[:, None])
        k, v = _read_chunk(pages, rows, row_w, first_s[row_w] + chunk * chunk_pages, chunk_pages, seen_wc)
        merged = _absorb(_Softmax(*map(take, state)), rows, take(q_rkgh), k, v, seen_wc[:, None, None, :])
        return _Softmax(*map(put, state, merged))

    def one_chunk(chunk, carry):
        num_groups = (jnp.sum(span_r > chunk * chunk_size) + width - 1) // width
        return lax.fori_loop(0, num_groups, lambda g, c: (one_group(chunk, g, *c), c[1]), carry)

    num_chunks = (jnp.max(span_r) + chunk_size - 1) // chunk_size
    state = _empty((padded, num_kv_heads, group), head_size)
    state, pages = lax.fori_loop(0, num_chunks, one_chunk, (state, pages))

    # Back to token order by a gather: on CPU a scatter is a loop over its rows.
    rank_s = jnp.argsort(order_r).astype(jnp.int32)
    row_t = _row_of_token(rows, num_tokens)
    is_decode_t = rows.q_len_s[row_t] == 1
    return jnp.where(is_decode_t[:, None, None, None], _result(state)[rank_s[row_t]], 0.0), pages


def _tiles(out_tkgh, q_tkgh, pages, rows: _Rows):
    """All rows with several queries: writes their tokens into `out_tkgh`; returns it and the pool."""
    num_tokens, num_kv_heads, group, head_size = q_tkgh.shape
    tile, chunk_pages = min(QUERY_TILE, num_tokens), rows.pages_of(TILE_CHUNK)
    chunk_size = chunk_pages * rows.page_size
    tiles_s = jnp.where(rows.q_len_s > 1, (rows.q_len_s + tile - 1) // tile, 0)
    end_s = jnp.cumsum(tiles_s)
    pad = ((0, tile), (0, 0), (0, 0), (0, 0))  # a tile may reach past the last token
    q_tkgh, out_tkgh = jnp.pad(q_tkgh, pad), jnp.pad(out_tkgh, pad)
    offset_q = jnp.arange(tile, dtype=jnp.int32)
    offset_c = jnp.arange(chunk_size, dtype=jnp.int32)

    def one_tile(index, carry):
        out_tkgh, pages = carry
        row = jnp.searchsorted(end_s, index, side="right").astype(jnp.int32)
        within = (index - (end_s[row] - tiles_s[row])) * tile
        token = rows.q_start_s[row] + within
        num_queries = jnp.minimum(tile, rows.q_len_s[row] - within)
        pos = rows.kv_len_s[row] - rows.q_len_s[row] + within
        first = _first_page(pos, rows)
        q_qkgh = lax.dynamic_slice_in_dim(q_tkgh, token, tile)
        q_1kxh = jnp.transpose(q_qkgh, (1, 2, 0, 3)).reshape(1, num_kv_heads, group * tile, head_size)

        def one_chunk(chunk, carry):
            state, pages = carry
            key_c = first * rows.page_size + chunk * chunk_size + offset_c
            query_q = pos + offset_q
            real_c = key_c < pos + num_queries
            seen_qc = (key_c[None, :] <= query_q[:, None]) & real_c[None, :]
            if rows.window is not None:
                seen_qc = seen_qc & (key_c[None, :] > query_q[:, None] - rows.window)
            page = (first + chunk * chunk_pages)[None]
            k, v = _read_chunk(pages, rows, row[None], page, chunk_pages, real_c[None, :])
            return _absorb(state, rows, q_1kxh, k, v, jnp.tile(seen_qc, (group, 1))[None, None]), pages

        num_chunks = (pos + num_queries - first * rows.page_size + chunk_size - 1) // chunk_size
        state = _empty((1, num_kv_heads, group * tile), head_size)
        state, pages = lax.fori_loop(0, num_chunks, one_chunk, (state, pages))
        result_qkgh = jnp.transpose(_result(state).reshape(num_kv_heads, group, tile, head_size), (2, 0, 1, 3))
        # The tail of a row's last tile belongs to the next row: keep what is there.
        is_mine_q = (offset_q < num_queries)[:, None, None, None]
        before = lax.dynamic_slice_in_dim(out_tkgh, token, tile)
        out_tkgh = lax.dynamic_update_slice_in_dim(out_tkgh, jnp.where(is_mine_q, result_qkgh, before), token, axis=0)
        return out_tkgh, pages

    out_tkgh, pages = lax.fori_loop(0, end_s[-1], one_tile, (out_tkgh, pages))
    return out_tkgh[:num_tokens], pages
