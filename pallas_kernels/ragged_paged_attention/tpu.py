"""Pallas for TPU: attention of prompts, chunks and decodes. New keys and values are written before (`tpu_write.py`).

A tile of work is what one row has in one block of the axis of all tokens, so that queries and results are plain blocks
which several rows may share. A decode's block is one token.

The pool stays in HBM. Pages of a tile's context are copied into one of two buffers in VMEM while the other is worked
on; the last chunk of a tile starts the copies of the next tile, so that short contexts do not wait for memory either.
Chips whose two cores are one device share the KV heads.

Source: keys in two buffers and tiles by row are as in the ragged paged attention kernel of tpu-inference; the list of
tiles is that of grouped matrix products, arXiv 2211.15841.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.interpreter import interpret
from jaxserve.pallas_kernels.ragged_paged_attention import tpu_write, tuned
from jaxserve.pallas_kernels.ragged_paged_attention.signature import Attended, Extras, Options, Rows, dot_dtype, to_pool
from jaxserve.pallas_kernels.ragged_paged_attention.tpu_tiles import slots_of_tile, tiles, where

_MASKED = -1e30  # finite, so that a fully masked chunk yields exp(0) * 0 rather than nan
_LANES = 128
_LOG2E = 1.4426950408889634
_MAX_TABLE_BYTES = 768 << 10  # of the 1 MB of SMEM; the rest is for lengths and tiles


class Shape(NamedTuple):
    """What does not change within a call of the kernel; all static."""

    tile: int  # tokens in a block
    num_parts: int  # of the KV heads; each is walked by itself
    num_heads: int  # KV heads of one part
    group: int  # query heads per KV head
    width: int  # lanes of queries and sums
    page_size: int
    double: int  # a key and its value
    chunk_pages: int
    table_width: int
    kv_dtype: jnp.dtype
    dot_dtype: jnp.dtype  # of the factors of both products
    options: Options

    @property
    def num_queries(self) -> int:
        """Query rows of one KV head in a tile: token-major, the group's heads of a token side by side."""
        return self.tile * self.group

    @property
    def chunk(self) -> int:
        """Keys in a buffer."""
        return self.chunk_pages * self.page_size

    @property
    def chunk_bytes(self) -> int:
        """What one turn of the inner loop reads from HBM."""
        return self.num_heads * self.chunk * self.double * self.kv_dtype.itemsize

    @property
    def chunk_flops(self) -> int:
        """What both products of one turn need, without the lanes that only fill up."""
        return 2 * self.num_heads * self.num_queries * self.chunk * self.double


class _Inputs(NamedTuple):
    q_tkgw: Any  # a block of `Shape.tile` tokens and one part's heads
    pages_pkbd: Any  # all of the pool, in HBM
    sinks_kgl: Any  # f32, in units of log2; one part's heads; or None
    kv_scale_2k: Any  # f32, all heads; or None


class _Sums(NamedTuple):
    out_tkgw: Any  # as `q_tkgw`
    lse_tkgl: Any  # f32, the same in every lane; or None


class _Scratch(NamedTuple):
    buffers_2ckbd: Any  # pages of two chunks
    sems_2: Any
    slot_1: Any  # the buffer that is worked on
    top_kql: Any  # f32, running maximum, the same in every lane
    total_kql: Any  # f32, running sum of weights, the same in every lane
    acc_kqw: Any  # f32, running sum of weighted values


class _Tile(NamedTuple):
    row: jax.Array
    begin: jax.Array  # its first token
    end: jax.Array  # the token past its last
    position: jax.Array  # of the first token
    first_page: jax.Array | int  # of the earliest key that is seen, as a column of the table
    num_keys: jax.Array  # of the row, up to the last one that is seen


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
    lse_tkgl = jnp.zeros((*q_tkgw.shape[:3], _LANES), jnp.float32) if options.wants_lse else None
    sums = _Sums(jnp.zeros_like(q_tkgw), lse_tkgl)  # what no tile visits stays zero
    for is_decode in (False, True):
        if is_decode or options.max_q_len != 1:
            shape = shape_of(q_tnh, pages, rows, options, is_decode=is_decode)
            takes_s = rows.q_len_s == 1 if is_decode else rows.q_len_s > 1
            sums = _attend_tiles(shape, q_tkgw, pages, rows, extras, sums, takes_s)
    out_tnh = sums.out_tkgw[:num_tokens, ..., -head_size:].reshape(q_tnh.shape)
    lse_tn = sums.lse_tkgl[:num_tokens, ..., 0].reshape(num_tokens, num_heads) if options.wants_lse else None
    return Attended(out_tnh, pages, lse_tn)


def _refuse(q_tnh, pages_pkbd, rows: Rows, options: Options) -> None:
    if pages_pkbd.dtype != options.kv_dtype:
        raise NotImplementedError("not a pool kept as bits")
    for dtype in (q_tnh.dtype, options.kv_dtype):
        if dtype == jnp.float16:
            raise NotImplementedError("TPUs have no float16")
    size = slots_of_tile(options.kv_dtype)
    if pages_pkbd.shape[2] % size:
        raise NotImplementedError(f"pages of {options.kv_dtype} must hold a multiple of {size} tokens")
    if rows.table_sm.size * 4 > _MAX_TABLE_BYTES:
        raise NotImplementedError(f"a table of {rows.table_sm.shape} does not fit the chip's scalar memory")


def _width(head_size: int) -> int:
    return head_size if head_size % _LANES == 0 else 2 * head_size


def shape_of(q_tnh, pages_pkbd, rows: Rows, options: Options, *, is_decode: bool) -> Shape:
    """How a call is cut into tiles and chunks. Looks at shapes and dtypes only; asks for the chip that is compiled for."""
    num_tokens, num_q_heads, head_size = q_tnh.shape
    _, num_kv_heads, page_size, double = pages_pkbd.shape
    # Decodes wait for memory: all heads of a page in one copy. Larger tiles wait for arithmetic, and for a place in VMEM.
    shares = 2 if _cores_of_device() == 2 and num_kv_heads % 2 == 0 else 1
    num_parts = shares if is_decode else num_kv_heads
    num_heads = num_kv_heads // num_parts
    chunk = tuned.chunk(num_heads * double * pages_pkbd.dtype.itemsize, is_decode=is_decode)
    return Shape(
        tile=1 if is_decode else min(tuned.query_tile(), num_tokens),
        num_parts=num_parts,
        num_heads=num_heads,
        group=num_q_heads // num_kv_heads,
        width=_width(head_size),
        page_size=page_size,
        double=double,
        chunk_pages=min(max(chunk // page_size, 1), rows.table_sm.shape[1]),
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


def _attend_tiles(shape: Shape, q_tkgw, pages, rows: Rows, extras: Extras, sums: _Sums, takes_s) -> _Sums:
    """Attend the rows that `takes_s` names into `sums`."""
    num_tokens, num_kv_heads, group, width = q_tkgw.shape
    tile, num_heads, num_rows = shape.tile, shape.num_heads, len(rows.kv_len_s)
    most = min(num_rows, num_tokens) if tile == 1 else num_tokens // tile + num_rows
    begin_s, end_s = (jnp.where(takes_s, x, 0) for x in (rows.q_start_s[:-1], rows.q_start_s[1:]))
    row_i, block_i, count = tiles(begin_s, end_s, tile, most)
    scalars = (row_i, block_i, rows.q_start_s, rows.kv_len_s, rows.table_sm.reshape(-1))

    inputs = _Inputs(q_tkgw, pages, None, extras.kv_scale_2k)
    if extras.sinks_n is not None:
        sinks_kg1 = extras.sinks_n.astype(jnp.float32).reshape(num_kv_heads, group, 1) * _LOG2E
        inputs = inputs._replace(sinks_kgl=jnp.broadcast_to(sinks_kg1, (num_kv_heads, group, _LANES)))

    def block(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (tile, num_heads, group, lanes), lambda part, i, row_i, block_i, *_: (block_i[i], part, 0, 0)
        )

    def if_there(spec: pl.BlockSpec, array) -> pl.BlockSpec | None:
        return None if array is None else spec

    of_part = pl.BlockSpec((num_heads, group, _LANES), lambda part, i, *_: (part, 0, 0))
    in_specs = _Inputs(
        block(width),
        pl.BlockSpec(memory_space=pl.ANY),
        if_there(of_part, inputs.sinks_kgl),
        if_there(pl.BlockSpec(memory_space=pltpu.SMEM), inputs.kv_scale_2k),
    )
    state = pltpu.VMEM((num_heads, shape.num_queries, _LANES), jnp.float32)
    scratch = _Scratch(
        pltpu.VMEM((2, shape.chunk_pages, num_heads, shape.page_size, shape.double), pages.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SMEM((1,), jnp.int32),
        state,
        state,
        pltpu.VMEM((num_heads, shape.num_queries, width), jnp.float32),
    )
    num_before = len(scalars) + len(jax.tree.leaves(inputs))
    (done,) = pl.pallas_call(
        functools.partial(_kernel, shape=shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(shape.num_parts, count),
            in_specs=(in_specs, jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), sums)),
            out_specs=(jax.tree.map(lambda x: block(x.shape[-1]), sums),),
            scratch_shapes=(scratch,),
        ),
        out_shape=(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), sums),),
        input_output_aliases={num_before + i: i for i in range(len(jax.tree.leaves(sums)))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tuned.vmem_bytes()
        ),
        interpret=interpret(),
        name="decode" if tile == 1 else "prefill",
    )(*scalars, inputs, sums)
    return done


def _kernel(
    row_i, block_i, q_start_s, kv_len_s, table, inputs: _Inputs, _, sums: _Sums, scratch: _Scratch, *, shape: Shape
):
    """One tile. Scores are kept in units of log2, because the chip has powers of two only."""
    page_size, window = shape.page_size, shape.options.window
    part, i, num_tiles = pl.program_id(0), pl.program_id(1), pl.num_programs(1)

    def tile_of(i) -> _Tile:
        row = row_i[i]
        begin = jnp.maximum(q_start_s[row], block_i[i] * shape.tile)
        end = jnp.minimum(q_start_s[row + 1], (block_i[i] + 1) * shape.tile)
        position = kv_len_s[row] - (q_start_s[row + 1] - begin)
        first_page = 0 if window is None else jnp.maximum(position - window + 1, 0) // page_size
        return _Tile(row, begin, end, position, first_page, position + end - begin)

    def for_each_page(i, chunk, slot, act) -> None:
        tile = tile_of(i)
        page = tile.first_page + chunk * shape.chunk_pages
        count = jnp.minimum((tile.num_keys + page_size - 1) // page_size - page, shape.chunk_pages)

        def copy(j, _):
            source = inputs.pages_pkbd.at[
                table[tile.row * shape.table_width + page + j], pl.ds(part * shape.num_heads, shape.num_heads)
            ]
            act(pltpu.make_async_copy(source, scratch.buffers_2ckbd.at[slot, j], scratch.sems_2.at[slot]))

        lax.fori_loop(0, count, copy, None)

    def start(i, chunk, slot) -> None:
        for_each_page(i, chunk, slot, lambda copy: copy.start())

    @pl.when(i == 0)
    def _():
        scratch.slot_1[0] = 0
        start(i, 0, 0)

    tile = tile_of(i)
    num_chunks = (tile.num_keys - tile.first_page * page_size + shape.chunk - 1) // shape.chunk
    for head in range(shape.num_heads):
        _clear(head, inputs, scratch, shape)

    def one_chunk(chunk, slot):
        is_last = chunk + 1 == num_chunks
        next_i, next_chunk = jnp.where(is_last, i + 1, i), jnp.where(is_last, 0, chunk + 1)

        @pl.when(next_i < num_tiles)
        def _():
            start(next_i, next_chunk, 1 - slot)

        for_each_page(i, chunk, slot, lambda copy: copy.wait())
        key = tile.first_page * page_size + chunk * shape.chunk  # of the first one in the buffer

        @pl.when(key + shape.chunk > tile.num_keys)
        def _():
            _drop_keys_past(tile.num_keys - key, slot, scratch, shape)

        seen_qc = _visible(tile, key, tile.position + block_i[i] * shape.tile - tile.begin, shape)
        for head in range(shape.num_heads):
            _absorb(head, slot, inputs, scratch, _scale_of(0, part, head, inputs, shape), seen_qc, shape)
        return 1 - slot

    scratch.slot_1[0] = lax.fori_loop(0, num_chunks, one_chunk, scratch.slot_1[0])

    is_first_visit = (i == 0) | (block_i[jnp.maximum(i - 1, 0)] != block_i[i])
    tokens = (tile.begin - block_i[i] * shape.tile, tile.end - block_i[i] * shape.tile)
    for head in range(shape.num_heads):
        _finish(head, sums, scratch, _scale_of(1, part, head, inputs, shape), is_first_visit, tokens, shape)


def _scale_of(which: int, part, head: int, inputs: _Inputs, shape: Shape):
    """Of the keys (0) or values (1) of a head."""
    return 1.0 if inputs.kv_scale_2k is None else inputs.kv_scale_2k[which, part * shape.num_heads + head]


def _clear(head: int, inputs: _Inputs, scratch: _Scratch, shape: Shape) -> None:
    """Nothing is absorbed yet but the sink."""
    size = (shape.num_queries, _LANES)
    top_ql, total_ql = jnp.full(size, _MASKED, jnp.float32), jnp.zeros(size, jnp.float32)
    if inputs.sinks_kgl is not None:
        sinks_tgl = jnp.broadcast_to(inputs.sinks_kgl[head][None], (shape.tile, shape.group, _LANES))
        top_ql, total_ql = sinks_tgl.reshape(size), jnp.ones(size, jnp.float32)
    scratch.top_kql[head], scratch.total_kql[head] = top_ql, total_ql
    scratch.acc_kqw[head] = jnp.zeros((shape.num_queries, shape.width), jnp.float32)


def _drop_keys_past(count, slot, scratch: _Scratch, shape: Shape) -> None:
    """Make zero the slots of a buffer from `count` on: they hold anything, nan included."""
    size = scratch.buffers_2ckbd.shape[1:]
    at = lax.broadcasted_iota(jnp.int32, size, 0) * shape.page_size + lax.broadcasted_iota(jnp.int32, size, 2)
    pages = scratch.buffers_2ckbd[slot]
    scratch.buffers_2ckbd[slot] = where(at < count, pages, jnp.zeros_like(pages))


def _visible(tile: _Tile, key, query, shape: Shape):
    """bool[query, key]: which keys of a chunk each query of the tile may see; `key` and `query` are the first positions."""
    size = (shape.num_queries, shape.chunk)
    key_qc = key + lax.broadcasted_iota(jnp.int32, size, 1)
    query_qc = query + _token_of_query(shape, size)
    seen_qc = key_qc <= query_qc
    window = shape.options.window
    return seen_qc if window is None else seen_qc & (key_qc > query_qc - window)


def _token_of_query(shape: Shape, size: tuple[int, int]):
    """i32[query, ...]: which token of the block each query row belongs to. A product and a shift: chips do not divide."""
    if shape.tile == 1:
        return jnp.zeros(size, jnp.int32)
    factor = -(-(1 << 16) // shape.group)  # exact for up to 2^16 / group rows
    return (lax.broadcasted_iota(jnp.int32, size, 0) * factor) >> 16


def _absorb(head: int, slot, inputs: _Inputs, scratch: _Scratch, key_scale, seen_qc, shape: Shape) -> None:
    """Merge a chunk into the running softmax of one KV head's queries."""
    options = shape.options
    kv_cd = scratch.buffers_2ckbd[slot, :, head].reshape(shape.chunk, shape.double).astype(shape.dot_dtype)
    k_cw, v_cw = kv_cd[:, : shape.width], kv_cd[:, -shape.width :]
    q_qw = inputs.q_tkgw[:, head].reshape(shape.num_queries, shape.width).astype(shape.dot_dtype)
    scores_qc = _dot(q_qw, k_cw, 1)
    if options.soft_cap is None:
        scores_qc = scores_qc * (options.scale * key_scale * _LOG2E)
    else:
        scores_qc = jnp.tanh(scores_qc * (options.scale * key_scale / options.soft_cap)) * (options.soft_cap * _LOG2E)
    scores_qc = jnp.where(seen_qc, scores_qc, _MASKED)
    before_ql = scratch.top_kql[head]
    top_ql = jnp.maximum(before_ql, jnp.max(scores_qc, axis=1, keepdims=True))
    weights_qc = jnp.exp2(scores_qc - top_ql[:, :1])
    shrink_ql = jnp.exp2(before_ql - top_ql)
    scratch.top_kql[head] = top_ql
    scratch.total_kql[head] = scratch.total_kql[head] * shrink_ql + jnp.sum(weights_qc, axis=1, keepdims=True)
    added_qw = _dot(weights_qc.astype(shape.dot_dtype), v_cw, 0)
    scratch.acc_kqw[head] = scratch.acc_kqw[head] * shrink_ql[:, :1] + added_qw


def _dot(a, b, axis: int):
    """`a` times `b`, contracting the last axis of the one with `axis` of the other, summed in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _finish(head: int, sums: _Sums, scratch: _Scratch, value_scale, is_first_visit, tokens, shape: Shape) -> None:
    """Results of one head, into the tokens [begin, end) of the block; the others may be another row's, visited before."""
    begin, end = tokens
    total_ql = scratch.total_kql[head]
    results = _Sums(scratch.acc_kqw[head] / total_ql[:, :1] * value_scale, None)
    if sums.lse_tkgl is not None:
        results = results._replace(lse_tkgl=scratch.top_kql[head] / _LOG2E + jnp.log(total_ql))
    for ref, result in zip(jax.tree.leaves(sums), jax.tree.leaves(results), strict=True):
        result = result.reshape(shape.tile, shape.group, result.shape[-1])
        if shape.tile > 1:
            token = lax.broadcasted_iota(jnp.int32, result.shape, 0)
            before = jnp.where(is_first_visit, 0.0, ref[:, head].astype(jnp.float32))
            result = jnp.where((token >= begin) & (token < end), result, before)
        ref[:, head] = result.astype(ref.dtype)
