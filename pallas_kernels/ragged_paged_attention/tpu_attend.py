"""Pallas for TPU: the kernel that attends. `tpu.py` says what it is for.

The pool stays in HBM. Pages of a tile's context are copied into one of two buffers in VMEM while the other is worked
on; the last chunk of a tile starts the copies of the next tile, so that short contexts do not wait for memory either.

Source: keys in two buffers and tiles by row are as in the ragged paged attention kernel of tpu-inference.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.interpreter import interpret
from jaxserve.pallas_kernels.ragged_paged_attention import tuned
from jaxserve.pallas_kernels.ragged_paged_attention.signature import Extras, Options, Rows
from jaxserve.pallas_kernels.ragged_paged_attention.tiles import tiles
from jaxserve.pallas_kernels.ragged_paged_attention.tpu_memory import LANES, where

LOG2E = 1.4426950408889634
_MASKED = -1e30  # finite, so that a fully masked chunk yields exp(0) * 0 rather than nan


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
    block: int  # queries whose scores are worked on together
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


class Inputs(NamedTuple):
    q_tkgw: Any  # a block of `Shape.tile` tokens and one part's heads
    pages_pkbd: Any  # all of the pool, in HBM
    sinks_kgl: Any  # f32, in units of log2; one part's heads; or None
    kv_scale_2k: Any  # f32, all heads; or None


class Sums(NamedTuple):
    out_tkgw: Any  # as `q_tkgw`
    lse_tkgl: Any  # f32, the same in every lane; or None


class _Scratch(NamedTuple):
    buffers_2ckbd: Any  # pages of two chunks
    sems_2: Any
    slot_1: Any  # the buffer that is worked on
    q_kqw: Any  # queries, one row after the other
    ahead_ql: Any  # i32, by how much a key in this lane is ahead of this row's token, if the first of both are one
    top_kql: Any  # f32, running maximum, the same in every lane
    total_kql: Any  # f32, running sum of weights, each lane for itself
    acc_kqw: Any  # f32, running sum of weighted values
    scores_1qc: tuple[Any, ...]  # f32, of a block each; blocks take them in turn
    places_2: Any  # where scores are stored, and where they are loaded: both 0, which the compiler cannot know


class _Tile(NamedTuple):
    row: jax.Array
    begin: jax.Array  # its first token
    end: jax.Array  # the token past its last
    position: jax.Array  # of the first token
    first_page: jax.Array | int  # of the earliest key that is seen, as a column of the table
    num_keys: jax.Array  # of the row, up to the last one that is seen


def attend_tiles(shape: Shape, q_tkgw, pages, rows: Rows, extras: Extras, sums: Sums, takes_s) -> Sums:
    """Attend the rows that `takes_s` names into `sums`."""
    num_tokens, num_kv_heads, group, width = q_tkgw.shape
    tile, num_heads, num_rows = shape.tile, shape.num_heads, len(rows.kv_len_s)
    most = min(num_rows, num_tokens) if tile == 1 else num_tokens // tile + num_rows
    begin_s, end_s = (jnp.where(takes_s, x, 0) for x in (rows.q_start_s[:-1], rows.q_start_s[1:]))
    row_i, block_i, count = tiles(begin_s, end_s, tile, most)
    scalars = (row_i, block_i, rows.q_start_s, rows.kv_len_s, rows.table_sm.reshape(-1))

    inputs = Inputs(q_tkgw, pages, None, extras.kv_scale_2k)
    if extras.sinks_n is not None:
        sinks_kg1 = extras.sinks_n.astype(jnp.float32).reshape(num_kv_heads, group, 1) * LOG2E
        inputs = inputs._replace(sinks_kgl=jnp.broadcast_to(sinks_kg1, (num_kv_heads, group, LANES)))

    def block(lanes: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (tile, num_heads, group, lanes), lambda part, i, row_i, block_i, *_: (block_i[i], part, 0, 0)
        )

    def if_there(spec: pl.BlockSpec, array) -> pl.BlockSpec | None:
        return None if array is None else spec

    of_part = pl.BlockSpec((num_heads, group, LANES), lambda part, i, *_: (part, 0, 0))
    in_specs = Inputs(
        block(width),
        pl.BlockSpec(memory_space=pl.ANY),
        if_there(of_part, inputs.sinks_kgl),
        if_there(pl.BlockSpec(memory_space=pltpu.SMEM), inputs.kv_scale_2k),
    )
    state = pltpu.VMEM((num_heads, shape.num_queries, LANES), jnp.float32)
    scratch = _Scratch(
        pltpu.VMEM((2, shape.chunk_pages, num_heads, shape.page_size, shape.double), pages.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.VMEM((num_heads, shape.num_queries, width), shape.dot_dtype),
        pltpu.VMEM((shape.num_queries, LANES), jnp.int32),
        state,
        state,
        pltpu.VMEM((num_heads, shape.num_queries, width), jnp.float32),
        (pltpu.VMEM((1, shape.block, shape.chunk), jnp.float32),) * min(shape.num_queries // shape.block, 2),
        pltpu.SMEM((2,), jnp.int32),
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
    row_i, block_i, q_start_s, kv_len_s, table, inputs: Inputs, _, sums: Sums, scratch: _Scratch, *, shape: Shape
):
    """One tile. Scores are kept in units of log2, because the chip has powers of two only."""
    page_size = shape.page_size
    part, i, num_tiles = pl.program_id(0), pl.program_id(1), pl.num_programs(1)

    def tile_of(i) -> _Tile:
        return _tile(row_i[i], block_i[i], q_start_s, kv_len_s, shape)

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
        scratch.slot_1[0] = scratch.places_2[0] = scratch.places_2[1] = 0
        start(i, 0, 0)

    tile = tile_of(i)
    num_chunks = (tile.num_keys - tile.first_page * page_size + shape.chunk - 1) // shape.chunk
    _begin(inputs, scratch, shape)

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

        lead = tile.position + block_i[i] * shape.tile - tile.begin - key  # of the block's first token over that key
        for head in range(shape.num_heads):
            _absorb(head, slot, lead, scratch, _scale_of(0, part, head, inputs, shape), shape)
        return 1 - slot

    scratch.slot_1[0] = lax.fori_loop(0, num_chunks, one_chunk, scratch.slot_1[0])

    is_first_visit = (i == 0) | (block_i[jnp.maximum(i - 1, 0)] != block_i[i])
    tokens = (tile.begin - block_i[i] * shape.tile, tile.end - block_i[i] * shape.tile)
    for head in range(shape.num_heads):
        _finish(head, sums, scratch, _scale_of(1, part, head, inputs, shape), is_first_visit, tokens, shape)


def _tile(row, block, q_start_s, kv_len_s, shape: Shape) -> _Tile:
    """What a row has in a block of tokens."""
    window = shape.options.window
    begin = jnp.maximum(q_start_s[row], block * shape.tile)
    end = jnp.minimum(q_start_s[row + 1], (block + 1) * shape.tile)
    position = kv_len_s[row] - (q_start_s[row + 1] - begin)
    first_page = 0 if window is None else jnp.maximum(position - window + 1, 0) // shape.page_size
    return _Tile(row, begin, end, position, first_page, position + end - begin)


def _scale_of(which: int, part, head: int, inputs: Inputs, shape: Shape):
    """Of the keys (0) or values (1) of a head."""
    return 1.0 if inputs.kv_scale_2k is None else inputs.kv_scale_2k[which, part * shape.num_heads + head]


def _begin(inputs: Inputs, scratch: _Scratch, shape: Shape) -> None:
    """Lay out the queries of a tile. Nothing is absorbed yet but the sink."""
    size = (shape.num_queries, LANES)
    lane_ql = lax.broadcasted_iota(jnp.int32, size, 1)
    scratch.ahead_ql[...] = lane_ql - _token_of_query(shape, size)
    for head in range(shape.num_heads):
        top_ql, total_ql = jnp.full(size, _MASKED, jnp.float32), jnp.zeros(size, jnp.float32)
        if inputs.sinks_kgl is not None:
            sinks_tgl = jnp.broadcast_to(inputs.sinks_kgl[head][None], (shape.tile, shape.group, LANES))
            top_ql, total_ql = sinks_tgl.reshape(size), jnp.where(lane_ql == 0, 1.0, 0.0)
        scratch.top_kql[head], scratch.total_kql[head] = top_ql, total_ql
        scratch.acc_kqw[head] = jnp.zeros((shape.num_queries, shape.width), jnp.float32)
        q_qw = inputs.q_tkgw[:, head].reshape(shape.num_queries, shape.width)
        scratch.q_kqw[head] = q_qw.astype(shape.dot_dtype)


def _token_of_query(shape: Shape, size: tuple[int, int]):
    """i32[query, ...]: which token of the block each query row belongs to. A product and a shift: chips do not divide."""
    if shape.tile == 1:
        return jnp.zeros(size, jnp.int32)
    factor = -(-(1 << 16) // shape.group)  # exact for up to 2^16 / group rows
    return (lax.broadcasted_iota(jnp.int32, size, 0) * factor) >> 16


def _drop_keys_past(count, slot, scratch: _Scratch, shape: Shape) -> None:
    """Make zero the slots of a buffer from `count` on: they hold anything, nan included."""
    size = scratch.buffers_2ckbd.shape[1:]
    at = lax.broadcasted_iota(jnp.int32, size, 0) * shape.page_size + lax.broadcasted_iota(jnp.int32, size, 2)
    pages = scratch.buffers_2ckbd[slot]
    scratch.buffers_2ckbd[slot] = where(at < count, pages, jnp.zeros_like(pages))


def _absorb(head: int, slot, lead, scratch: _Scratch, key_scale, shape: Shape) -> None:
    """Merge a chunk into the running softmax of one KV head's queries.

    Block by block. The next block's scores are asked for before this one's are used, so that the matrix units have work
    meanwhile. Scores wait for the maxima of their rows in VMEM: they would fill all registers. They are stored at one place
    and loaded from another, which is the same; if the compiler knew, it would keep them in registers and spill.
    """
    kv_cd = scratch.buffers_2ckbd[slot, :, head].reshape(shape.chunk, shape.double).astype(shape.dot_dtype)
    blocks = [slice(q, q + shape.block) for q in range(0, shape.num_queries, shape.block)]
    lanes = [slice(c, c + LANES) for c in range(0, shape.chunk, LANES)]
    stored, loaded = scratch.places_2[0], scratch.places_2[1]

    def score(index: int) -> jax.Array:
        """Store a block's scores. Returns their maxima, each lane for itself."""
        q_qw, ahead_ql = scratch.q_kqw[head, blocks[index]], scratch.ahead_ql[blocks[index]]
        scores_qc = _score(_dot(q_qw, kv_cd[:, : shape.width], 1), key_scale, shape.options)
        seen = [_mask(scores_qc[:, at], ahead_ql, lead - at.start, shape.options) for at in lanes]
        for at, scores_ql in zip(lanes, seen, strict=True):  # the last block may have fewer rows
            scratch.scores_1qc[index % 2][stored, : scores_ql.shape[0], at] = scores_ql
        return functools.reduce(jnp.maximum, seen)

    following_ql = score(0)
    for index, queries in enumerate(blocks):
        most_ql, at = following_ql, (head, queries)
        if index + 1 < len(blocks):
            following_ql = score(index + 1)
        before_ql = scratch.top_kql[at]
        top_ql = jnp.maximum(before_ql, jnp.max(most_ql, axis=1, keepdims=True))
        scores_qc = scratch.scores_1qc[index % 2].at[loaded, : before_ql.shape[0]]
        weights = [jnp.exp2(scores_qc[:, lane] - top_ql) for lane in lanes]
        shrink_ql = jnp.exp2(before_ql - top_ql)
        added_qw = _dot(jnp.concatenate(weights, axis=1).astype(shape.dot_dtype), kv_cd[:, -shape.width :], 0)
        scratch.top_kql[at] = top_ql
        scratch.total_kql[at] = functools.reduce(jnp.add, weights, scratch.total_kql[at] * shrink_ql)
        scratch.acc_kqw[at] = scratch.acc_kqw[at] * shrink_ql[:, :1] + added_qw


def _score(products, key_scale, options: Options):
    """Logits in units of log2."""
    if options.soft_cap is None:
        return products * (options.scale * key_scale * LOG2E)
    return jnp.tanh(products * (options.scale * key_scale / options.soft_cap)) * (options.soft_cap * LOG2E)


def _mask(scores_ql, ahead_ql, lead, options: Options):
    """Drop keys that a query may not see; the first query leads the first key by `lead`."""
    seen_ql = ahead_ql <= lead
    if options.window is not None:
        seen_ql = seen_ql & (ahead_ql > lead - options.window)
    return jnp.where(seen_ql, scores_ql, _MASKED)


def _dot(a, b, axis: int):
    """`a` times `b`, contracting the last axis of the one with `axis` of the other, summed in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _finish(head: int, sums: Sums, scratch: _Scratch, value_scale, is_first_visit, tokens, shape: Shape) -> None:
    """Results of one head, into the tokens [begin, end) of the block; the others may be another row's, visited before."""
    begin, end = tokens
    total_q1 = jnp.sum(scratch.total_kql[head], axis=1, keepdims=True)
    results = Sums(scratch.acc_kqw[head] / total_q1 * value_scale, None)
    if sums.lse_tkgl is not None:
        results = results._replace(lse_tkgl=scratch.top_kql[head] / LOG2E + jnp.log(total_q1))
    for ref, result in zip(jax.tree.leaves(sums), jax.tree.leaves(results), strict=True):
        result = result.reshape(shape.tile, shape.group, result.shape[-1])
        if shape.tile > 1:
            token = lax.broadcasted_iota(jnp.int32, result.shape, 0)
            before = jnp.where(is_first_visit, 0.0, ref[:, head].astype(jnp.float32))
            result = jnp.where((token >= begin) & (token < end), result, before)
        ref[:, head] = result.astype(ref.dtype)
