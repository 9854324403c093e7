"""Pallas for NVIDIA Hopper (Mosaic GPU): the kernel that attends. `gpu.py` says what it is for.

A program works on one tile of one head. Its last warpgroup copies keys and values from the pool into a ring of buffers in
shared memory; the others multiply, 64 query rows each, and keep the running softmax in registers.

Source: warpgroups that copy and warpgroups that multiply, arXiv 2407.08608 (FlashAttention-3); the instructions,
https://docs.jax.dev/en/latest/pallas/gpu/reference.html.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.ragged_paged_attention.signature import Options, Rows

WORKER_ROWS = 64  # query rows of a warpgroup that multiplies: the least that its instruction takes
TILE_ROWS = 8  # of shared memory; copies and products take whole ones

_MASKED = -1e30  # finite, so that a fully masked chunk yields exp(0) * 0 rather than nan
_LN2 = 0.6931471805599453
_WORKER_REGISTERS, _COPIER_REGISTERS = 240, 24  # of a thread: two workers and one copier share 65,536; 232 would spill


class Shape(NamedTuple):
    """What does not change within a call; all static."""

    num_workers: int  # warpgroups that multiply
    num_parts: int  # programs that share the context of one tile
    box: int  # query rows that are copied in and out for each worker
    group: int  # query heads per KV head
    num_kv_heads: int
    head_size: int
    page_size: int
    chunk: int  # keys in a buffer
    num_buffers: int
    is_decode: bool
    options: Options

    @property
    def piece(self) -> int:
        """Keys that lie together in the pool and in a buffer."""
        return min(self.page_size, self.chunk)

    @property
    def sum_columns(self) -> int:
        """Columns of a part's sums that are written at once: all of wide heads would leave no room for two buffers."""
        return 128 if self.head_size % 128 == 0 else self.head_size

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a program: queries, buffers, and sums of parts in float32."""
        rows = self.num_workers * WORKER_ROWS
        sums = rows * self.sum_columns * 4 if self.num_parts > 1 else 0
        return rows * (self.head_size * 2 + 4) + sums + self.num_buffers * self.chunk_bytes

    @property
    def chunk_bytes(self) -> int:
        """What one turn of the inner loop reads."""
        return self.chunk * 2 * self.head_size * 2


def attend_tiles(q, pages, rows: Rows, row_i, block_i, used_i, shape: Shape):
    """Run the kernel over all tiles: sums [i x w q h] in q's dtype (float32 if there are parts) and their f32[i x w q] lse,
    where x is the head (a query head, or for decodes a KV head), w the part and q the query row within the tile."""
    num_programs = shape.num_kv_heads * (1 if shape.is_decode else shape.group)
    has_parts = shape.num_parts > 1
    out_dtype = jnp.dtype(jnp.float32 if has_parts else q.dtype)
    tile = shape.num_workers * shape.box
    lead = (len(row_i), num_programs, shape.num_parts)
    q_rows = (shape.num_workers, WORKER_ROWS)
    scratch = {
        "q_smem": _matrix((*q_rows, shape.head_size), q.dtype),
        "kv_smem": _matrix((shape.num_buffers, shape.chunk, 2 * shape.head_size), q.dtype, shape.head_size),
        "lse_smem": plgpu.SMEM(q_rows, jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=shape.num_workers),
        "ready": plgpu.Barrier(num_arrivals=shape.chunk // shape.piece, num_barriers=shape.num_buffers),
        "free": plgpu.Barrier(num_arrivals=shape.num_workers, num_barriers=shape.num_buffers),
        "mended": plgpu.Barrier(num_arrivals=shape.num_workers),
    }
    if has_parts:
        scratch["out_smem"] = _matrix((*q_rows, shape.sum_columns), out_dtype)
    return plgpu.kernel(
        functools.partial(_kernel, shape=shape),
        out_type=(
            jax.ShapeDtypeStruct((*lead, tile, shape.head_size), out_dtype),
            jax.ShapeDtypeStruct((*lead, shape.num_workers * WORKER_ROWS), jnp.float32),
        ),
        scratch_types=scratch,
        grid=(num_programs, shape.num_parts, len(row_i)),
        grid_names=("head", "part", "tile"),
        num_threads=shape.num_workers + 1,
        thread_name="warpgroup",
        # Layouts of registers are said by this file, not inferred: what JAX 0.11 infers by default, 0.10 cannot.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name="decode" if shape.is_decode else "prefill",
    )(
        row_i,
        block_i,
        used_i,
        rows.q_start_s,
        rows.kv_len_s,
        rows.table_sm,
        q,
        pages.reshape(-1, shape.page_size, 2 * shape.head_size),  # [page, KV head] as one index
    )


def _matrix(shape: tuple[int, ...], dtype: jnp.dtype, columns: int | None = None):
    """Shared memory for matrices as the copies and the products want them: in swizzled tiles of 8 rows. Parts of so many
    columns can be taken on their own."""
    swizzle = _swizzle(columns or shape[-1], dtype)
    tile = plgpu.TilingTransform((8, swizzle // dtype.itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tile, plgpu.SwizzleTransform(swizzle)))


def _swizzle(columns: int, dtype: jnp.dtype) -> int:
    """Bytes in a row of a tile of shared memory."""
    return plgpu.find_swizzle(columns * dtype.itemsize * 8)


class _Span(NamedTuple):
    """What a program works on."""

    row: jax.Array
    token: jax.Array  # of the tile's first query
    position: jax.Array  # of that query in its sequence
    num_keys: jax.Array  # that any query of the tile sees, from the start of the sequence
    first_key: jax.Array  # of this part
    num_chunks: jax.Array  # of this part


def _span(row_i, block_i, used_i, q_start_s, kv_len_s, shape: Shape) -> _Span:
    part, i = lax.axis_index("part"), lax.axis_index("tile")
    row = row_i[i]
    end = q_start_s[row + 1]
    tile = 1 if shape.is_decode else shape.num_workers * shape.box
    token = q_start_s[row] + block_i[i] * tile
    position = kv_len_s[row] - (end - token)
    num_keys = position + jnp.minimum(end - token, tile)
    window = shape.options.window
    first = (
        jnp.int32(0) if window is None else lax.div(jnp.maximum(position - window + 1, 0), shape.piece) * shape.piece
    )
    num_chunks = lax.div(num_keys - first + shape.chunk - 1, shape.chunk)
    part_chunks = lax.div(num_chunks + shape.num_parts - 1, shape.num_parts)
    begin = part * part_chunks
    num_chunks = jnp.clip(num_chunks - begin, 0, part_chunks)
    return _Span(row, token, position, num_keys, first + begin * shape.chunk, jnp.where(used_i[i] > 0, num_chunks, 0))


def _kernel(
    row_i, block_i, used_i, q_start_s, kv_len_s, table, q_ref, pages_ref, out_ref, lse_ref, *, shape: Shape, **scratch
):
    """One part of one tile of one head."""
    warpgroup = lax.axis_index("warpgroup")
    span = _span(row_i, block_i, used_i, q_start_s, kv_len_s, shape)

    @pl.when(warpgroup == shape.num_workers)
    def _():
        _copy(table, pages_ref, scratch, span, shape)

    @pl.when(warpgroup < shape.num_workers)
    def _():
        _multiply(warpgroup, q_ref, out_ref, lse_ref, scratch, span, shape)


def _copy(table, pages_ref, scratch, span: _Span, shape: Shape) -> None:
    """Fill the buffers in turn, each as soon as all workers are done with what it held."""
    if not shape.is_decode:
        plgpu.set_max_registers(_COPIER_REGISTERS, action="decrease")
    head = lax.axis_index("head")
    kv_head = head if shape.is_decode else lax.div(head, shape.group)
    last_page = lax.div(span.num_keys - 1, shape.page_size)

    @pl.loop(0, span.num_chunks)
    def _(i):
        slot = lax.rem(i, shape.num_buffers)

        @pl.when(i >= shape.num_buffers)
        def _():
            plgpu.barrier_wait(scratch["free"].at[slot])

        # Pages are looked up some at a time: one by one each would wait for memory, all at once they fill the registers.
        for some in range(0, shape.chunk, 4 * shape.piece):
            offsets = range(some, min(some + 4 * shape.piece, shape.chunk), shape.piece)
            keys = [span.first_key + i * shape.chunk + offset for offset in offsets]
            # Past the last page the last one is read again: every buffer expects the same number of copies.
            pages = [table[span.row, jnp.minimum(lax.div(key, shape.page_size), last_page)] for key in keys]
            for offset, key, page in zip(offsets, keys, pages, strict=True):
                plgpu.copy_gmem_to_smem(
                    pages_ref.at[
                        page * shape.num_kv_heads + kv_head, pl.ds(lax.rem(key, shape.page_size), shape.piece)
                    ],
                    scratch["kv_smem"].at[slot, pl.ds(offset, shape.piece)],
                    scratch["ready"].at[slot],
                )


def _multiply(worker, q_ref, out_ref, lse_ref, scratch, span: _Span, shape: Shape) -> None:
    """Attend from 64 query rows to all keys of the part; write the sums and their lse."""
    if not shape.is_decode:
        plgpu.set_max_registers(_WORKER_REGISTERS, action="increase")
    head, part, i = lax.axis_index("head"), lax.axis_index("part"), lax.axis_index("tile")
    q_smem = scratch["q_smem"].at[worker]
    source = q_ref.at[i, head] if shape.is_decode else q_ref.at[pl.ds(span.token + worker * shape.box, shape.box), head]
    plgpu.copy_gmem_to_smem(source, q_smem.at[pl.ds(0, shape.box)], scratch["q_ready"].at[worker])
    plgpu.barrier_wait(scratch["q_ready"].at[worker])

    # Without a window the first chunks are seen whole by every query.
    num_whole = jnp.int32(0)
    if shape.options.window is None:
        num_whole = jnp.clip(lax.div(span.position + 1 - span.first_key, shape.chunk), 0, span.num_chunks)
    carry = (_full(0.0, WORKER_ROWS, shape.head_size), _full(_MASKED, WORKER_ROWS), _full(0.0, WORKER_ROWS))
    absorb = functools.partial(_absorb, worker=worker, q_smem=q_smem, scratch=scratch, span=span, shape=shape)
    carry = lax.fori_loop(0, num_whole, functools.partial(absorb, is_whole=True), carry)
    carry = lax.fori_loop(num_whole, span.num_chunks, functools.partial(absorb, is_whole=False), carry)

    acc, top, total = carry
    is_empty = total <= 0.0
    total = jnp.where(is_empty, 1.0, total)
    sums = acc / _over_columns(total, acc)
    lse_smem = scratch["lse_smem"].at[worker]
    lse_smem[...] = jnp.where(is_empty, _MASKED, top * _LN2 + jnp.log(total))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[i, head, part, pl.ds(worker * WORKER_ROWS, WORKER_ROWS)])
    out_smem = scratch["out_smem"].at[worker] if "out_smem" in scratch else q_smem
    columns = out_smem.shape[1]
    for column in range(0, shape.head_size, columns):
        plgpu.wait_smem_to_gmem(0)
        out_smem[...] = sums[:, column : column + columns].astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            out_smem.at[pl.ds(0, shape.box)],
            out_ref.at[i, head, part, pl.ds(worker * shape.box, shape.box), pl.ds(column, columns)],
        )
    plgpu.wait_smem_to_gmem(0)


def _absorb(i, carry, *, is_whole: bool, worker, q_smem, scratch, span: _Span, shape: Shape):
    """Merge a chunk into the running softmax. Scores are in units of log2, because the chip has powers of two only."""
    acc, top, total = carry
    options, head_size = shape.options, shape.head_size
    slot = lax.rem(i, shape.num_buffers)
    k_smem = scratch["kv_smem"].at[slot, :, pl.ds(0, head_size)]
    v_smem = scratch["kv_smem"].at[slot, :, pl.ds(head_size, head_size)]
    plgpu.barrier_wait(scratch["ready"].at[slot])

    def score(sums):
        plgpu.wgmma(sums, q_smem, plgpu.transpose_ref(k_smem, (1, 0)))
        return sums[...]

    scores = pl.run_scoped(score, plgpu.WGMMAAccumulatorRef((WORKER_ROWS, shape.chunk), jnp.float32))
    if options.soft_cap is None:
        scores = scores * (options.scale / _LN2)
    else:
        scores = jnp.tanh(scores * (options.scale / options.soft_cap)) * (options.soft_cap / _LN2)
    if not is_whole:
        first_key = span.first_key + i * shape.chunk
        key = first_key + _iota(scores.shape, 1)
        query = jnp.full_like(key, span.position)
        if not shape.is_decode:
            query = query + worker * shape.box + _iota(scores.shape, 0)
        seen = key <= query
        if options.window is not None:
            seen = seen & (key > query - options.window)
        scores = jnp.where(seen, scores, _MASKED)
        _mend(v_smem, first_key, worker, scratch, span, shape)

    before, top = top, jnp.maximum(top, jnp.max(scores, axis=1))
    shrink = jnp.exp2(before - top)
    weights = jnp.exp2(scores - _over_columns(top, scores))
    total = total * shrink + jnp.sum(weights, axis=1)
    weights = weights.astype(q_smem.dtype)

    def add(sums):
        plgpu.wgmma(sums, weights, v_smem)

    acc = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(acc * _over_columns(shrink, acc)))
    plgpu.barrier_arrive(scratch["free"].at[slot])
    return acc, top, total


def _mend(v_smem, first_key, worker, scratch, span: _Span, shape: Shape) -> None:
    """Clear the values past the last key: those slots hold anything, nan included, and nan times no weight is nan."""

    @pl.when(first_key + shape.chunk > span.num_keys)
    def _():
        @pl.when(worker * WORKER_ROWS < shape.chunk)
        def _():
            columns = (
                _swizzle(shape.head_size, v_smem.dtype) // v_smem.dtype.itemsize
            )  # few at a time: registers are short
            for column in range(0, shape.head_size, columns):
                mine = v_smem.at[pl.ds(worker * WORKER_ROWS, WORKER_ROWS), pl.ds(column, columns)]
                key = first_key + worker * WORKER_ROWS + _iota(mine.shape, 0)
                values = plgpu.load(mine, (), layout=plgpu.Layout.WGMMA)
                mine[...] = jnp.where(key < span.num_keys, values, jnp.zeros_like(values))
            plgpu.commit_smem()

        plgpu.barrier_arrive(scratch["mended"])
        plgpu.barrier_wait(scratch["mended"])


def _full(value: float, *shape: int):
    """f32, held by the registers of a warpgroup as the results of its products are, or as one number per row of them."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _iota(shape: tuple[int, ...], axis: int):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def _over_columns(x, like):
    return lax.broadcast_in_dim(x, like.shape, (0,))
