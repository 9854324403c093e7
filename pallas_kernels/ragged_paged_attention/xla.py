"""Plain XLA, made for CPU: loops whose trip counts follow the real lengths, so one compiled step serves every context.

Keys and values are read a chunk at a time and merged by a running maximum. Rows with one query (decodes) go together,
longest first, in groups of `ROWS`; rows with more are cut into tiles of `QUERY_TILE` queries, each reading its chunks once.
Padded table columns and empty rows cost nothing, because no iteration visits them.

A bfloat16 model over a bfloat16 pool multiplies in bfloat16 (twice the speed here); all sums and the softmax are float32.

Two habits keep the pool from being copied. It is carried through every loop and out again: a loop that only read it would
leave two live users of one buffer, and XLA would copy it before the next write. And a pool of narrow floats should be
stored as bits: XLA on CPU converts a whole bfloat16 pool to float32 to update a few rows of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.pallas_kernels.platform import precision_of
from jaxserve.pallas_kernels.ragged_paged_attention.signature import Attended, Extras, Options, Rows, dot_dtype, to_pool

DECODE_CHUNK = 256  # keys per iteration of decode rows
TILE_CHUNK = 256  # keys per iteration of a tile
ROWS = 8  # decode rows per iteration
QUERY_TILE = 128  # queries of one row per iteration

_MASKED = -1e30  # finite, so that a fully masked chunk yields exp(0) * 0 rather than nan


class _Call(NamedTuple):
    """What does not change within a call; all but the arrays is static."""

    rows: Rows
    extras: Extras
    options: Options
    dot_dtype: jnp.dtype  # of the factors of both products
    page_size: int

    def pages_of(self, chunk: int) -> int:
        """Pages per chunk of about so many keys."""
        return min(max(chunk // self.page_size, 1), self.rows.table_sm.shape[1])


class _Softmax(NamedTuple):
    """Running softmax of some queries: maximum, sum of weights, weighted sum of values."""

    top: jax.Array  # f32[... q]
    total: jax.Array  # f32[... q]
    acc: jax.Array  # f32[... q h]


def attend(q_tnh, k_tkh, v_tkh, pages_pkbd, rows: Rows, extras: Extras, options: Options) -> Attended:
    """See `op.ragged_paged_attention`."""
    call = _Call(rows, extras, options, dot_dtype(q_tnh.dtype, options.kv_dtype), pages_pkbd.shape[2])
    num_tokens, num_heads, head_size = q_tnh.shape
    num_kv_heads = k_tkh.shape[1]
    group = num_heads // num_kv_heads
    q_tkgh = q_tnh.astype(call.dot_dtype).reshape(num_tokens, num_kv_heads, group, head_size)
    pages = write(pages_pkbd, to_pool(k_tkh, v_tkh, options.kv_dtype, extras.kv_scale_2k), rows)
    state_tkg, pages = _decode(q_tkgh, pages, call)
    if options.max_q_len != 1:
        state_tkg, pages = _tiles(state_tkg, q_tkgh, pages, call)
    out_tkgh = state_tkg.acc / jnp.where(state_tkg.total > 0, state_tkg.total, 1.0)[..., None]
    if extras.kv_scale_2k is not None:
        out_tkgh = out_tkgh * extras.kv_scale_2k[1][None, :, None, None]
    lse_tn = None
    if options.wants_lse:
        lse_tn = (state_tkg.top + jnp.log(state_tkg.total)).reshape(num_tokens, num_heads)
    return Attended(out_tkgh.reshape(q_tnh.shape).astype(q_tnh.dtype), pages, lse_tn)


def write(pages, new_tkd, rows: Rows):
    """Put every token's key and value, [t k d] as the pool holds them, into its slot. Padding goes to a page past the pool,
    and is dropped."""
    num_tokens, page_size = new_tkd.shape[0], pages.shape[2]
    token_t = jnp.arange(num_tokens, dtype=jnp.int32)
    row_t = rows.of_token(num_tokens)
    pos_t = rows.kv_len_s[row_t] - (rows.q_start_s[row_t + 1] - token_t)
    page_t = rows.table_sm[row_t, pos_t // page_size]
    page_t = jnp.where(token_t < rows.q_start_s[-1], page_t, pages.shape[0])
    bits_tkd = lax.bitcast_convert_type(new_tkd, pages.dtype)
    return pages.at[page_t, :, pos_t % page_size, :].set(bits_tkd, mode="drop")


def _read_chunk(pages, call: _Call, row_w, first_page_w, chunk_pages: int, real_wc):
    """Keys and values [w k c h] of one chunk of each row; values that are not real are zero, whatever is stored."""
    _, num_kv_heads, page_size, double = pages.shape
    flat_xbd = pages.reshape(-1, page_size, double)  # [page, kv head] as one index
    column_wc = first_page_w[:, None] + jnp.arange(chunk_pages, dtype=jnp.int32)[None, :]
    page_wc = call.rows.table_sm.at[row_w[:, None], column_wc].get(mode="clip")  # a last chunk may pass the table's end
    head_k = jnp.arange(num_kv_heads, dtype=jnp.int32)
    index_wkc = page_wc[:, None, :] * num_kv_heads + head_k[None, :, None]
    shape = (row_w.shape[0], num_kv_heads, chunk_pages * page_size, double)
    kv = lax.bitcast_convert_type(flat_xbd.at[index_wkc].get(mode="clip").reshape(shape), call.options.kv_dtype)
    k, v = jnp.split(kv.astype(call.dot_dtype), 2, axis=-1)
    return k, jnp.where(real_wc[:, None, :, None], v, jnp.zeros_like(v))


def _absorb(state: _Softmax, call: _Call, q, k, v, seen) -> _Softmax:
    """Merge one chunk: q [w k q h], k and v [w k c h], seen broadcastable to [w k q c].

    A query that sees nothing of a chunk adds exp(0) weights while its maximum is still `_MASKED`; the first chunk it
    does see shrinks those to exactly zero, so no second mask is needed.
    """
    batch = ((0, 1), (0, 1))
    multiply = functools.partial(lax.dot_general, precision=precision_of(q.dtype), preferred_element_type=jnp.float32)
    scores = multiply(q, k, (((3,), (3,)), batch)) * call.options.scale
    if call.extras.kv_scale_2k is not None:
        scores = scores * call.extras.kv_scale_2k[0][None, :, None, None]
    if call.options.soft_cap is not None:
        scores = call.options.soft_cap * jnp.tanh(scores / call.options.soft_cap)
    scores = jnp.where(seen, scores, _MASKED)
    top = jnp.maximum(state.top, jnp.max(scores, axis=-1))
    weights = jnp.exp(scores - top[..., None]).astype(v.dtype)
    shrink = jnp.exp(state.top - top)
    added = multiply(weights, v, (((3,), (2,)), batch))
    return _Softmax(
        top=top,
        total=state.total * shrink + jnp.sum(weights, axis=-1, dtype=jnp.float32),
        acc=state.acc * shrink[..., None] + added,
    )


def _empty(shape: tuple[int, ...], call: _Call, head_size: int) -> _Softmax:
    """Nothing absorbed yet but the sink, for [..., k, g, q] or [..., k, g] queries as `shape` says with q = shape[3:]."""
    top, total = jnp.full(shape, _MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    if call.extras.sinks_n is not None:
        sinks_kg = call.extras.sinks_n.astype(jnp.float32).reshape(shape[1:3])
        top = jnp.broadcast_to(sinks_kg.reshape(1, *shape[1:3], *(1 for _ in shape[3:])), shape)
        total = jnp.ones(shape, jnp.float32)
    return _Softmax(top, total, jnp.zeros((*shape, head_size), jnp.float32))


def _first_page(pos, call: _Call):
    """The page of the earliest key that a query at `pos` sees."""
    if call.options.window is None:
        return jnp.zeros_like(pos)
    return jnp.maximum(pos - (call.options.window - 1), 0) // call.page_size


def _decode(q_tkgh, pages, call: _Call):
    """All rows with one query. Returns [t k g] sums, empty for other tokens, and the pool."""
    rows, window = call.rows, call.options.window
    num_tokens, num_kv_heads, group, head_size = q_tkgh.shape
    num_rows = rows.kv_len_s.shape[0]
    width, chunk_pages = min(ROWS, num_rows), call.pages_of(DECODE_CHUNK)
    chunk_size = chunk_pages * call.page_size
    padded = -(-num_rows // width) * width

    first_s = _first_page(rows.kv_len_s - 1, call)
    span_s = jnp.where(rows.q_len_s == 1, rows.kv_len_s - first_s * call.page_size, 0)
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
        if window is not None:
            pos_wc = (first_s[row_w] * call.page_size)[:, None] + within_wc
            seen_wc = seen_wc & (pos_wc > (rows.kv_len_s[row_w] - 1 - window)[:, None])
        k, v = _read_chunk(pages, call, row_w, first_s[row_w] + chunk * chunk_pages, chunk_pages, seen_wc)
        merged = _absorb(_Softmax(*map(take, state)), call, take(q_rkgh), k, v, seen_wc[:, None, None, :])
        return _Softmax(*map(put, state, merged))

    def one_chunk(chunk, carry):
        num_groups = (jnp.sum(span_r > chunk * chunk_size) + width - 1) // width
        return lax.fori_loop(0, num_groups, lambda g, c: (one_group(chunk, g, *c), c[1]), carry)

    num_chunks = (jnp.max(span_r) + chunk_size - 1) // chunk_size
    state = _empty((padded, num_kv_heads, group), call, head_size)
    state, pages = lax.fori_loop(0, num_chunks, one_chunk, (state, pages))

    # Back to token order by a gather: on CPU a scatter is a loop over its rows.
    rank_s = jnp.argsort(order_r).astype(jnp.int32)
    row_t = rows.of_token(num_tokens)
    is_decode_t = rows.q_len_s[row_t] == 1
    state_tkg = jax.tree.map(lambda x: x[rank_s[row_t]], state)
    none_tkg = _empty((num_tokens, num_kv_heads, group), call, head_size)

    def choose(some, none):
        return jnp.where(is_decode_t.reshape(-1, *(1 for _ in some.shape[1:])), some, none)

    return jax.tree.map(choose, state_tkg, none_tkg), pages


def _tiles(state_tkg: _Softmax, q_tkgh, pages, call: _Call):
    """All rows with several queries: puts the sums of their tokens into `state_tkg`; returns it and the pool."""
    rows, window = call.rows, call.options.window
    num_tokens, num_kv_heads, group, head_size = q_tkgh.shape
    tile, chunk_pages = min(QUERY_TILE, num_tokens), call.pages_of(TILE_CHUNK)
    chunk_size = chunk_pages * call.page_size
    tiles_s = jnp.where(rows.q_len_s > 1, (rows.q_len_s + tile - 1) // tile, 0)
    end_s = jnp.cumsum(tiles_s)

    def pad(x):  # a tile may reach past the last token
        return jnp.pad(x, ((0, tile), *((0, 0) for _ in x.shape[1:])))

    q_tkgh, state_tkg = pad(q_tkgh), jax.tree.map(pad, state_tkg)
    offset_q = jnp.arange(tile, dtype=jnp.int32)
    offset_c = jnp.arange(chunk_size, dtype=jnp.int32)

    def one_tile(index, carry):
        state_tkg, pages = carry
        row = jnp.searchsorted(end_s, index, side="right").astype(jnp.int32)
        within = (index - (end_s[row] - tiles_s[row])) * tile
        token = rows.q_start_s[row] + within
        num_queries = jnp.minimum(tile, rows.q_len_s[row] - within)
        pos = rows.kv_len_s[row] - rows.q_len_s[row] + within
        first = _first_page(pos, call)
        q_qkgh = lax.dynamic_slice_in_dim(q_tkgh, token, tile)
        q_1kxh = jnp.transpose(q_qkgh, (1, 2, 0, 3)).reshape(1, num_kv_heads, group * tile, head_size)

        def one_chunk(chunk, carry):
            state, pages = carry
            key_c = first * call.page_size + chunk * chunk_size + offset_c
            query_q = pos + offset_q
            real_c = key_c < pos + num_queries
            seen_qc = (key_c[None, :] <= query_q[:, None]) & real_c[None, :]
            if window is not None:
                seen_qc = seen_qc & (key_c[None, :] > query_q[:, None] - window)
            page = (first + chunk * chunk_pages)[None]
            k, v = _read_chunk(pages, call, row[None], page, chunk_pages, real_c[None, :])
            return _absorb(state, call, q_1kxh, k, v, jnp.tile(seen_qc, (group, 1))[None, None]), pages

        num_chunks = (pos + num_queries - first * call.page_size + chunk_size - 1) // chunk_size
        empty = _empty((1, num_kv_heads, group, tile), call, head_size)
        flat = (1, num_kv_heads, group * tile)
        state = jax.tree.map(lambda x: x.reshape(*flat, *x.shape[4:]), empty)
        state, pages = lax.fori_loop(0, num_chunks, one_chunk, (state, pages))
        is_mine_q = offset_q < num_queries  # the tail of a row's last tile belongs to the next row: keep what is there

        def put(whole, part):
            part = jnp.moveaxis(part.reshape(num_kv_heads, group, tile, *part.shape[3:]), 2, 0)
            is_mine = is_mine_q.reshape(-1, *(1 for _ in part.shape[1:]))
            before = lax.dynamic_slice_in_dim(whole, token, tile)
            return lax.dynamic_update_slice_in_dim(whole, jnp.where(is_mine, part, before), token, axis=0)

        return jax.tree.map(put, state_tkg, state), pages

    state_tkg, pages = lax.fori_loop(0, end_s[-1], one_tile, (state_tkg, pages))
    return jax.tree.map(lambda x: x[:num_tokens], state_tkg), pages
