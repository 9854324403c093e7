"""Pallas for TPU: new keys and values into their slots of the pool, in place.

A slot is part of a memory tile, the least that can be written, so the tiles in which new slots lie are read, blended and
written. A tile of work is one of them: a row's positions are cut where the memory tiles of a page end.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels.interpreter import interpret
from jaxserve.pallas_kernels.ragged_paged_attention.signature import Rows
from jaxserve.pallas_kernels.ragged_paged_attention.tiles import tiles
from jaxserve.pallas_kernels.ragged_paged_attention.tpu_memory import slots_of_tile, where

AT_ONCE = 16  # tiles written together


def write(pages_pkbd, new_tkd, rows: Rows):
    """Put every token's key and value, [t k d] in the pool's dtype, into its slot. Returns the pool, in its old place."""
    num_tokens, num_heads, double = new_tkd.shape
    size = slots_of_tile(pages_pkbd.dtype)
    begin_s = rows.kv_len_s - rows.q_len_s
    most = min(num_tokens, num_tokens // size + 2 * len(begin_s))
    most = -(-most // AT_ONCE) * AT_ONCE
    row_x, group_x, count = tiles(begin_s, rows.kv_len_s, size, most)
    first_x = rows.q_start_s[row_x] - begin_s[row_x] + group_x * size
    token_xg = first_x[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
    new_xkgd = jnp.swapaxes(new_tkd[jnp.clip(token_xg, 0, num_tokens - 1)], 1, 2)
    scalars = (row_x, group_x, count[None], begin_s, rows.kv_len_s, rows.table_sm.reshape(-1))
    block = (AT_ONCE, num_heads, size, double)
    return pl.pallas_call(
        functools.partial(_kernel, table_width=rows.table_sm.shape[1], page_size=pages_pkbd.shape[2]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=((count + AT_ONCE - 1) // AT_ONCE,),
            in_specs=[pl.BlockSpec(block, lambda i, *_: (i, 0, 0, 0)), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.VMEM(block, pages_pkbd.dtype), pltpu.SemaphoreType.DMA((AT_ONCE,))],
        ),
        out_shape=jax.ShapeDtypeStruct(pages_pkbd.shape, pages_pkbd.dtype),
        input_output_aliases={len(scalars) + 1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret(),
        name="write_pages",
    )(*scalars, new_xkgd, pages_pkbd)


def step_keys(pages_pkbd) -> int:
    """Slots that a grid step reads and writes."""
    return AT_ONCE * slots_of_tile(pages_pkbd.dtype)


def step_bytes(pages_pkbd) -> int:
    """What a grid step reads from the pool and writes to it."""
    _, num_heads, _, double = pages_pkbd.shape
    return 2 * step_keys(pages_pkbd) * num_heads * double * pages_pkbd.dtype.itemsize


def _kernel(
    row_x, group_x, count, begin_s, end_s, table, new_ref, _, pages_ref, buffer, sems, *, table_width, page_size
):
    size = buffer.shape[2]
    base = pl.program_id(0) * AT_ONCE
    num_tiles = jnp.minimum(AT_ONCE, count[0] - base)

    def slots(w):
        begin = group_x[base + w] * size
        page = table[row_x[base + w] * table_width + begin // page_size]
        return pages_ref.at[page, :, pl.ds(pl.multiple_of(begin % page_size, size), size)]

    def for_each_tile(act: Callable[[jax.Array], None]) -> None:
        lax.fori_loop(0, num_tiles, lambda w, _: act(w), None)

    def blend(w) -> None:
        load(w).wait()
        position = group_x[base + w] * size + lax.broadcasted_iota(jnp.int32, buffer.shape[1:], 1)
        row = row_x[base + w]
        is_new = (position >= begin_s[row]) & (position < end_s[row])
        buffer[w] = where(is_new, new_ref[w], buffer[w])
        store(w).start()

    def load(w):
        return pltpu.make_async_copy(slots(w), buffer.at[w], sems.at[w])

    def store(w):
        return pltpu.make_async_copy(buffer.at[w], slots(w), sems.at[w])

    for_each_tile(lambda w: load(w).start())
    for_each_tile(blend)
    for_each_tile(lambda w: store(w).wait())
