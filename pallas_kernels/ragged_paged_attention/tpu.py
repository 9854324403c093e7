"""Pallas for TPU: two kernels, one that writes new keys and values into the pool, and one that attends.

Both walk a list of *tiles*, made on the device from the lengths of the rows. A tile is what one row has in one block of an
axis: for writing, the axis is the row's own positions, cut where the memory tiles of a page end; for attending it is the
axis of all tokens, so that queries and results are plain blocks which several rows may share. A decode's block is one token.

The pool stays in HBM. Pages of a tile's context are copied into one of two buffers in VMEM while the other is worked
on; the last chunk of a tile starts the copies of the next tile, so that short contexts do not wait for memory either.
Chips whose two cores are one device share the KV heads.

Source: keys in two buffers and tiles by row are as in the ragged paged attention kernel of tpu-inference; the list of
tiles is that of grouped matrix products, arXiv 2211.15841.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.platform import target_platform
from jaxserve.pallas_kernels.ragged_paged_attention import tuned
from jaxserve.pallas_kernels.ragged_paged_attention.signature import Attended, Extras, Options, Rows, dot_dtype, to_pool

WRITES = 16  # tiles written at once
INTERPRET = pltpu.InterpretParams()  # how the kernels run on a CPU; tests turn on the detection of races

_MASKED = -1e30  # finite, so that a fully masked chunk yields exp(0) * 0 rather than nan
_LANES = 128
_LOG2E = 1.4426950408889634
_MAX_TABLE_BYTES = 768 << 10  # of the 1 MB of SMEM; the rest is for lengths and tiles


class _Shape(NamedTuple):
    """What does not change within a call; all static."""

    tile: int  # tokens in a block
    num_heads: int  # KV heads of one part
    group: int  # query heads per KV head
    width: int  # lanes of queries and sums
    page_size: int
    chunk_pages: int
    table_width: int
    dot_dtype: jnp.dtype  # of the factors of both products
    has_sinks: bool
    has_scale: bool
    options: Options

    @property
    def num_queries(self) -> int:
        """Query rows of one KV head in a tile: token-major, the group's heads of a token side by side."""
        return self.tile * self.group

    @property
    def chunk(self) -> int:
        """Keys in a buffer."""
        return self.chunk_pages * self.page_size


def attend(q_tnh, k_tkh, v_tkh, pages_pkbd, rows: Rows, extras: Extras, options: Options) -> Attended:
    """See `op.ragged_paged_attention`."""
    _refuse(q_tnh, pages_pkbd, rows, options)
    num_tokens, num_heads, head_size = q_tnh.shape
    num_kv_heads = pages_pkbd.shape[1]
    pages = _write(pages_pkbd, to_pool(k_tkh, v_tkh, options.kv_dtype, extras.kv_scale_2k), rows)

    # Keys and values are whole lane tiles, or else both products take them together: zeros in the query leave the values
    # out of the scores, and the half of the sums that belongs to keys is dropped.
    group, is_whole = num_heads // num_kv_heads, head_size % _LANES == 0
    q_tkgw = q_tnh.reshape(num_tokens, num_kv_heads, group, head_size)
    if not is_whole:
        q_tkgw = jnp.pad(q_tkgw, ((0, 0), (0, 0), (0, 0), (0, head_size)))
    tile = min(tuned.query_tile(), num_tokens)
    padding = -num_tokens % tile
    q_tkgw = jnp.pad(q_tkgw, ((0, padding), (0, 0), (0, 0), (0, 0)))
    lse_tkgl = jnp.zeros((*q_tkgw.shape[:3], _LANES), jnp.float32) if options.wants_lse else None
    sums = (jnp.zeros_like(q_tkgw), lse_tkgl)  # what no tile visits stays zero
    if options.max_q_len != 1:
        sums = _attend_tiles(q_tkgw, pages, rows, extras, options, sums, rows.q_len_s > 1, tile)
    sums = _attend_tiles(q_tkgw, pages, rows, extras, options, sums, rows.q_len_s == 1, 1)
    out_tkgw, lse_tkgl = sums
    out_tnh = out_tkgw[:num_tokens, ..., -head_size:].reshape(q_tnh.shape)
    lse_tn = None if lse_tkgl is None else lse_tkgl[:num_tokens, ..., 0].reshape(num_tokens, num_heads)
    return Attended(out_tnh, pages, lse_tn)


def _refuse(q_tnh, pages_pkbd, rows: Rows, options: Options) -> None:
    if pages_pkbd.dtype != options.kv_dtype:
        raise NotImplementedError("not a pool kept as bits")
    for dtype in (q_tnh.dtype, options.kv_dtype):
        if dtype == jnp.float16:
            raise NotImplementedError("TPUs have no float16")
    size = _slots_of_tile(options.kv_dtype)
    if pages_pkbd.shape[2] % size:
        raise NotImplementedError(f"pages of {options.kv_dtype} must hold a multiple of {size} tokens")
    if rows.table_sm.size * 4 > _MAX_TABLE_BYTES:
        raise NotImplementedError(f"a table of {rows.table_sm.shape} does not fit the chip's scalar memory")


def _tiles(begin_s, end_s, size: int, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row and block of each tile, when row s has [begin, end) of an axis cut into blocks of a size; and how many."""
    first_s = begin_s // size
    count_s = jnp.where(end_s > begin_s, (end_s - 1) // size - first_s + 1, 0)
    last_s = jnp.cumsum(count_s)
    index_i = jnp.arange(most, dtype=jnp.int32)
    row_i = jnp.minimum(jnp.searchsorted(last_s, index_i, side="right"), len(begin_s) - 1).astype(jnp.int32)
    block_i = first_s[row_i] + index_i - (last_s[row_i] - count_s[row_i])
    return row_i, block_i.astype(jnp.int32), last_s[-1].astype(jnp.int32)


def _slots_of_tile(dtype: jnp.dtype) -> int:
    """Tokens of a page that lie in one memory tile, the least that can be written."""
    return 32 // dtype.itemsize


def _interpret() -> pltpu.InterpretParams | bool:
    return INTERPRET if target_platform() == "cpu" else False


def _write(pages_pkbd, new_tkd, rows: Rows):
    """Put every token's key and value into its slot; a slot is part of a memory tile, which is read, blended, written."""
    num_tokens, num_heads, double = new_tkd.shape
    size = _slots_of_tile(pages_pkbd.dtype)
    begin_s = rows.kv_len_s - rows.q_len_s
    most = min(num_tokens, num_tokens // size + 2 * len(begin_s))
    most = -(-most // WRITES) * WRITES
    row_x, group_x, count = _tiles(begin_s, rows.kv_len_s, size, most)
    first_x = rows.q_start_s[row_x] - begin_s[row_x] + group_x * size
    token_xg = first_x[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
    new_xkgd = jnp.swapaxes(new_tkd[jnp.clip(token_xg, 0, num_tokens - 1)], 1, 2)
    scalars = (row_x, group_x, count[None], begin_s, rows.kv_len_s, rows.table_sm.reshape(-1))
    return pl.pallas_call(
        functools.partial(_write_kernel, table_width=rows.table_sm.shape[1], page_size=pages_pkbd.shape[2]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=((count + WRITES - 1) // WRITES,),
            in_specs=[
                pl.BlockSpec((WRITES, num_heads, size, double), lambda i, *_: (i, 0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((WRITES, num_heads, size, double), pages_pkbd.dtype),
                pltpu.SemaphoreType.DMA((WRITES,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(pages_pkbd.shape, pages_pkbd.dtype),
        input_output_aliases={len(scalars) + 1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=_interpret(),
        name="write_pages",
    )(*scalars, new_xkgd, pages_pkbd)


def _write_kernel(
    row_x, group_x, count, begin_s, end_s, table, new_ref, _, pages_ref, buffer, sems, *, table_width, page_size
):
    size = buffer.shape[2]
    base = pl.program_id(0) * WRITES
    num_tiles = jnp.minimum(WRITES, count[0] - base)

    def slots(w):
        begin = group_x[base + w] * size
        page = table[row_x[base + w] * table_width + begin // page_size]
        return pages_ref.at[page, :, pl.ds(pl.multiple_of(begin % page_size, size), size)]

    def for_each_tile(act: Callable[[jax.Array], None]) -> None:
        lax.fori_loop(0, num_tiles, lambda w, _: act(w), None)

    def blend(w) -> None:
        read(w).wait()
        position = group_x[base + w] * size + lax.broadcasted_iota(jnp.int32, buffer.shape[1:], 1)
        row = row_x[base + w]
        is_new = (position >= begin_s[row]) & (position < end_s[row])
        buffer[w] = _where(is_new, new_ref[w], buffer[w])
        write(w).start()

    def read(w):
        return pltpu.make_async_copy(slots(w), buffer.at[w], sems.at[w])

    def write(w):
        return pltpu.make_async_copy(buffer.at[w], slots(w), sems.at[w])

    for_each_tile(lambda w: read(w).start())
    for_each_tile(blend)
    for_each_tile(lambda w: write(w).wait())


def _where(condition, x, y):
    """`jnp.where` for narrow numbers too, which the chip cannot select by a mask of another width."""
    if x.dtype.itemsize == 4:
        return jnp.where(condition, x, y)
    return jnp.where(condition, x.astype(jnp.float32), y.astype(jnp.float32)).astype(x.dtype)


def _attend_tiles(q_tkgw, pages, rows: Rows, extras: Extras, options: Options, sums, takes_s, tile: int):
    """Attend the rows that `takes_s` names, in blocks of `tile` tokens, into `sums`."""
    num_tokens, num_kv_heads, group, width = q_tkgw.shape
    _, _, page_size, double = pages.shape
    # Decodes wait for memory: all heads of a page in one copy. Larger tiles wait for arithmetic, and for a place in VMEM.
    num_parts = num_kv_heads if tile > 1 else 2 if _cores_of_device() == 2 and num_kv_heads % 2 == 0 else 1
    num_heads = num_kv_heads // num_parts
    chunk = tuned.chunk(num_heads * double * pages.dtype.itemsize, is_decode=tile == 1)
    shape = _Shape(
        tile=tile,
        num_heads=num_heads,
        group=group,
        width=width,
        page_size=page_size,
        chunk_pages=min(max(chunk // page_size, 1), rows.table_sm.shape[1]),
        table_width=rows.table_sm.shape[1],
        dot_dtype=dot_dtype(q_tkgw.dtype, pages.dtype),
        has_sinks=extras.sinks_n is not None,
        has_scale=extras.kv_scale_2k is not None,
        options=options,
    )
    num_rows = len(rows.kv_len_s)
    most = min(num_rows, num_tokens) if tile == 1 else num_tokens // tile + num_rows
    row_i, block_i, count = _tiles(
        jnp.where(takes_s, rows.q_start_s[:-1], 0), jnp.where(takes_s, rows.q_start_s[1:], 0), tile, most
    )
    scalars = (row_i, block_i, rows.q_start_s, rows.kv_len_s, rows.table_sm.reshape(-1))

    def block(last: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (tile, shape.num_heads, group, last), lambda part, i, row_i, block_i, *_: (block_i[i], part, 0, 0)
        )

    inputs, in_specs = [q_tkgw, pages], [block(width), pl.BlockSpec(memory_space=pl.ANY)]
    if extras.sinks_n is not None:
        sinks_kg1 = extras.sinks_n.astype(jnp.float32).reshape(num_kv_heads, group, 1) * _LOG2E
        inputs.append(jnp.broadcast_to(sinks_kg1, (num_kv_heads, group, _LANES)))
        in_specs.append(pl.BlockSpec((shape.num_heads, group, _LANES), lambda part, i, *_: (part, 0, 0)))
    if extras.kv_scale_2k is not None:
        inputs.append(extras.kv_scale_2k.astype(jnp.float32))
        in_specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    outputs = [x for x in sums if x is not None]
    aliases = {len(scalars) + len(inputs) + i: i for i in range(len(outputs))}
    in_specs += [pl.BlockSpec(memory_space=pl.ANY) for _ in outputs]
    state = pltpu.VMEM((shape.num_heads, shape.num_queries, _LANES), jnp.float32)
    done = pl.pallas_call(
        functools.partial(_attend_kernel, shape=shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_parts, count),
            in_specs=in_specs,
            out_specs=[block(x.shape[-1]) for x in outputs],
            scratch_shapes=[
                pltpu.VMEM((2, shape.chunk_pages, shape.num_heads, page_size, double), pages.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                state,
                state,
                pltpu.VMEM((shape.num_heads, shape.num_queries, width), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tuned.vmem_bytes()
        ),
        interpret=_interpret(),
        name="decode" if tile == 1 else "prefill",
    )(*scalars, *inputs, *outputs)
    return (done[0], done[1] if len(done) == 2 else None)


def _cores_of_device() -> int:
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.num_cores or 1
    return getattr(jax.devices()[0], "num_cores", 1) or 1


def _attend_kernel(row_i, block_i, q_start_s, kv_len_s, table, q_ref, pages_ref, *refs, shape: _Shape):
    """One tile. Scores are kept in units of log2, because the chip has powers of two only."""
    refs = list(refs)
    sinks_ref = refs.pop(0) if shape.has_sinks else None
    scale_ref = refs.pop(0) if shape.has_scale else None
    num_outputs = 2 if shape.options.wants_lse else 1
    out_ref, lse_ref = refs[num_outputs], refs[num_outputs + 1] if shape.options.wants_lse else None
    buffers, sems, slot_ref, top_ref, total_ref, acc_ref = refs[2 * num_outputs :]
    options, page_size = shape.options, shape.page_size
    part, i, num_tiles = pl.program_id(0), pl.program_id(1), pl.num_programs(1)

    def span(i):
        """Row of a tile, its tokens [begin, end), the first one's position, its first page, and how many keys there are."""
        row = row_i[i]
        begin = jnp.maximum(q_start_s[row], block_i[i] * shape.tile)
        end = jnp.minimum(q_start_s[row + 1], (block_i[i] + 1) * shape.tile)
        position = kv_len_s[row] - (q_start_s[row + 1] - begin)
        first = 0 if options.window is None else jnp.maximum(position - options.window + 1, 0) // page_size
        return row, begin, end, position, first, position + end - begin

    def for_each_page(i, chunk, slot, act) -> None:
        row, _, _, _, first, num_keys = span(i)
        page = first + chunk * shape.chunk_pages
        count = jnp.minimum((num_keys + page_size - 1) // page_size - page, shape.chunk_pages)

        def copy(j, _):
            source = pages_ref.at[
                table[row * shape.table_width + page + j], pl.ds(part * shape.num_heads, shape.num_heads)
            ]
            act(pltpu.make_async_copy(source, buffers.at[slot, j], sems.at[slot]))

        lax.fori_loop(0, count, copy, None)

    def start(i, chunk, slot) -> None:
        for_each_page(i, chunk, slot, lambda copy: copy.start())

    @pl.when(i == 0)
    def _():
        slot_ref[0] = 0
        start(i, 0, 0)

    _, begin, end, position, first, num_keys = span(i)
    num_chunks = (num_keys - first * page_size + shape.chunk - 1) // shape.chunk
    for head in range(shape.num_heads):
        top, total = jnp.full(top_ref.shape[1:], _MASKED, jnp.float32), jnp.zeros(top_ref.shape[1:], jnp.float32)
        if sinks_ref is not None:
            sinks_gl = jnp.broadcast_to(sinks_ref[head][None], (shape.tile, shape.group, _LANES))
            top, total = sinks_gl.reshape(top.shape), jnp.ones_like(total)
        top_ref[head], total_ref[head] = top, total
        acc_ref[head] = jnp.zeros(acc_ref.shape[1:], jnp.float32)

    def one_chunk(chunk, slot):
        is_last = chunk + 1 == num_chunks
        next_i, next_chunk = jnp.where(is_last, i + 1, i), jnp.where(is_last, 0, chunk + 1)

        @pl.when(next_i < num_tiles)
        def _():
            start(next_i, next_chunk, 1 - slot)

        for_each_page(i, chunk, slot, lambda copy: copy.wait())
        key = first * page_size + chunk * shape.chunk  # of the first one in the buffer

        @pl.when(key + shape.chunk > num_keys)
        def _():  # slots past the last key hold anything, nan included
            at = lax.broadcasted_iota(jnp.int32, buffers.shape[1:], 0) * page_size
            at = key + at + lax.broadcasted_iota(jnp.int32, buffers.shape[1:], 2)
            buffers[slot] = _where(at < num_keys, buffers[slot], jnp.zeros_like(buffers[slot]))

        seen_qc = visible(key)
        for head in range(shape.num_heads):
            key_scale = 1.0 if scale_ref is None else scale_ref[0, part * shape.num_heads + head]
            _absorb(head, buffers[slot, :, head], q_ref, top_ref, total_ref, acc_ref, key_scale, seen_qc, shape)
        return 1 - slot

    def visible(key):
        """bool[query, key]: which keys of a chunk, the first being `key`, each query of the tile may see."""
        size = (shape.num_queries, shape.chunk)
        key_qc = key + lax.broadcasted_iota(jnp.int32, size, 1)
        query_qc = position + _token_of_query(shape, size) + (block_i[i] * shape.tile - begin)
        seen_qc = key_qc <= query_qc
        return seen_qc if options.window is None else seen_qc & (key_qc > query_qc - options.window)

    slot_ref[0] = lax.fori_loop(0, num_chunks, one_chunk, slot_ref[0])

    is_first_visit = (i == 0) | (block_i[jnp.maximum(i - 1, 0)] != block_i[i])
    for head in range(shape.num_heads):
        value_scale = 1.0 if scale_ref is None else scale_ref[1, part * shape.num_heads + head]
        results = [(out_ref, acc_ref[head] / total_ref[head][:, :1] * value_scale)]
        if lse_ref is not None:
            results.append((lse_ref, top_ref[head] / _LOG2E + jnp.log(total_ref[head])))
        for ref, result in results:
            result = result.reshape(shape.tile, shape.group, result.shape[-1])
            if shape.tile > 1:
                token = block_i[i] * shape.tile + lax.broadcasted_iota(jnp.int32, result.shape, 0)
                before = jnp.where(is_first_visit, 0.0, ref[:, head].astype(jnp.float32))
                result = jnp.where((token >= begin) & (token < end), result, before)
            ref[:, head] = result.astype(ref.dtype)


def _token_of_query(shape: _Shape, size: tuple[int, int]):
    """i32[query, ...]: which token of the block each query row belongs to. A product and a shift: chips do not divide."""
    if shape.tile == 1:
        return jnp.zeros(size, jnp.int32)
    factor = -(-(1 << 16) // shape.group)  # exact for up to 2^16 / group rows
    return (lax.broadcasted_iota(jnp.int32, size, 0) * factor) >> 16


def _absorb(head, kv_pbd, q_ref, top_ref, total_ref, acc_ref, key_scale, seen_qc, shape: _Shape) -> None:
    """Merge a chunk into the running softmax of one KV head's queries."""
    options = shape.options
    kv_cd = kv_pbd.reshape(shape.chunk, kv_pbd.shape[-1]).astype(shape.dot_dtype)
    k_cw, v_cw = kv_cd[:, : shape.width], kv_cd[:, -shape.width :]
    q_qw = q_ref[:, head].reshape(shape.num_queries, shape.width).astype(shape.dot_dtype)
    scores_qc = _dot(q_qw, k_cw, 1)
    if options.soft_cap is None:
        scores_qc = scores_qc * (options.scale * key_scale * _LOG2E)
    else:
        scores_qc = jnp.tanh(scores_qc * (options.scale * key_scale / options.soft_cap)) * (options.soft_cap * _LOG2E)
    scores_qc = jnp.where(seen_qc, scores_qc, _MASKED)
    before_ql = top_ref[head]
    top_ql = jnp.maximum(before_ql, jnp.max(scores_qc, axis=1, keepdims=True))
    weights_qc = jnp.exp2(scores_qc - top_ql[:, :1])
    shrink_ql = jnp.exp2(before_ql - top_ql)
    top_ref[head] = top_ql
    total_ref[head] = total_ref[head] * shrink_ql + jnp.sum(weights_qc, axis=1, keepdims=True)
    acc_ref[head] = acc_ref[head] * shrink_ql[:, :1] + _dot(weights_qc.astype(shape.dot_dtype), v_cw, 0)


def _dot(a, b, axis: int):
    """`a` times `b`, contracting the last axis of the one with `axis` of the other, summed in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
