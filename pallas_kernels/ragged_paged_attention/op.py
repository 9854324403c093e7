"""Attention of a ragged batch of queries over a paged KV pool: prefill, chunks and decodes in one call."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Shaped

from jaxserve.pallas_kernels.dispatch import Implementation, dispatch, tried
from jaxserve.pallas_kernels.ragged_paged_attention import checks, cpu, ref, xla
from jaxserve.pallas_kernels.ragged_paged_attention.signature import Attended, Extras, Options, Rows


def _loaded_late(backend: str) -> Implementation:
    """Pallas takes 0.1 s to load and Mosaic GPU 0.3 s, for nothing on a machine without their chips."""

    def attend(*args: Any) -> Attended:
        return importlib.import_module(f"{__package__}.{backend}").attend(*args)

    return attend


IMPLEMENTATIONS = {
    "tpu": _loaded_late("tpu"),
    "gpu": _loaded_late("gpu"),
    "triton": _loaded_late("triton"),
    "cpu": cpu.attend,
    "xla": xla.attend,
    "ref": ref.attend,
}
ORDER = {"tpu": ("tpu", "xla"), "gpu": ("gpu", "triton", "xla"), "cpu": ("cpu", "xla")}  # what is tried, by platform


def ragged_paged_attention(
    q_tnh: Float[Array, "t n h"],
    k_tkh: Float[Array, "t k h"],
    v_tkh: Float[Array, "t k h"],
    pages_pkbd: Shaped[Array, "p k b d"],
    table_sm: Int[Array, "s m"],
    q_start_s: Int[Array, " s1"],
    kv_len_s: Int[Array, " s"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_n: Float[Array, " _"] | None = None,
    kv_scale_2k: Float[Array, "_ _"] | None = None,
    max_q_len: int | None = None,
    kv_dtype: jnp.dtype | None = None,
    wants_lse: bool = False,
    impl: str | None = None,
) -> Attended:
    """Store the new keys and values in their pages, then attend causally from every query over its row's pages.

    Writing is part of the operation because only an implementation knows how to do it without copying the pool: the
    returned pages reuse the buffer of `pages_pkbd` when the enclosing jit may (donate it).

    Args:
      q_tnh: queries, rotated, not scaled; n is a multiple of the k KV heads, query head i reads KV head i // (n // k).
      k_tkh, v_tkh: keys (rotated) and values of the same tokens; brought to the pool's dtype.
      pages_pkbd: the pool: p pages of b tokens; d = 2 h, a token's key and its value side by side, so that heads of 64 fill
        the 128 lanes of a TPU. Or wider: then each half ends in zeros, which this operation writes. Slots past a row's
        length are never used.
      table_sm: page ids of each row in order of position. Entries past a row's length may hold anything.
      q_start_s: i32[s + 1], where each row's tokens begin in q, ascending; the last entry ends the last row. Tokens past
        it are padding, and their output is unspecified but finite.
      kv_len_s: tokens of each row, this step's included; its queries are the last ones. 0 for an empty row.
      scale: factor of q . k before the softmax (static).
      window: attend only to the last `window` positions, the query's own included; None for all (static).
      soft_cap: scores x become soft_cap * tanh(x / soft_cap) (static). Source: Gemma 2, arXiv 2408.00118.
      sinks_n: a logit per query head that takes part in the softmax and carries no value. Source: arXiv 2309.17453, as
        learnt by gpt-oss.
      kv_scale_2k: what stored keys (row 0) and values (row 1) of a KV head are multiplied with; for int8 and float8 pools.
      max_q_len: 1 promises that no row has more than one query; None promises nothing (static).
      kv_dtype: what the pool holds, when its array type is an unsigned integer of the same width (static). A pool kept as
        bits is faster on CPU; see `xla.py`.
      wants_lse: also return the logarithm of each softmax's denominator (static), with which partial results over parts of
        the context can be merged; -1e30 or less where a query saw nothing.
      impl: "tpu" (Pallas), "gpu" (Pallas for NVIDIA Hopper), "triton" (other NVIDIA GPUs, through jax-triton, one device),
        "cpu" (C++ with AVX-512), "xla", "ref", or None for the first that takes the case (static).

    Returns: float[t n h] in q's dtype (softmax and sums are computed in float32), the pool, and f32[t n] if wanted.

    Raises: ValueError for arguments that do not fit each other, before anything is traced. Outside of a jitted function and
    with `jax_enable_checks` also for rows that lie outside of the pool or of the tokens (`checks.py`).

    Source: paging, arXiv 2309.06180; softmax over blocks with a running maximum, arXiv 2205.14135.
    """
    kv_dtype = jnp.dtype(kv_dtype or pages_pkbd.dtype)
    _check(q_tnh, k_tkh, v_tkh, pages_pkbd, table_sm, q_start_s, kv_len_s, sinks_n, kv_scale_2k, kv_dtype)
    if window is not None and window < 1:
        raise ValueError(f"{window=} must be at least 1, or None")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{soft_cap=} must be above 0, or None")
    ids = (table_sm, q_start_s, kv_len_s)
    if checks.wanted() and not any(isinstance(x, Tracer) for x in ids):
        num_pages, _, page_size, _ = pages_pkbd.shape
        checks.check_rows(*ids, num_tokens=q_tnh.shape[0], num_pages=num_pages, page_size=page_size)
    head_size, spare = q_tnh.shape[2], pages_pkbd.shape[3] // 2 - q_tnh.shape[2]
    if spare:
        q_tnh, k_tkh, v_tkh = (jnp.pad(x, ((0, 0), (0, 0), (0, spare))) for x in (q_tnh, k_tkh, v_tkh))
    done = dispatch(
        "ragged_paged_attention",
        tried(IMPLEMENTATIONS, ORDER, impl),
        impl,
        q_tnh,
        k_tkh,
        v_tkh,
        pages_pkbd,
        Rows(table_sm, q_start_s, kv_len_s),
        Extras(sinks_n, kv_scale_2k),
        Options(scale, window, soft_cap, max_q_len, kv_dtype, wants_lse),
    )
    return done._replace(out_tnh=done.out_tnh[..., :head_size]) if spare else done


def _check(q_tnh, k_tkh, v_tkh, pages_pkbd, table_sm, q_start_s, kv_len_s, sinks_n, kv_scale_2k, kv_dtype) -> None:
    """The first argument that does not fit the others, by name."""
    num_tokens, num_heads, head_size = q_tnh.shape
    _, num_kv_heads, page_size, double = pages_pkbd.shape
    num_rows = kv_len_s.shape[0]
    kv_shape = (num_tokens, num_kv_heads, head_size)
    if k_tkh.shape != kv_shape or v_tkh.shape != kv_shape:
        raise ValueError(f"{k_tkh.shape=} and {v_tkh.shape=} must be {kv_shape}, as {q_tnh.shape=} and the pool say")
    if double % 2 or double < 2 * head_size:
        raise ValueError(
            f"{pages_pkbd.shape=} must end in twice the head size of {q_tnh.shape=}, or twice a larger one"
        )
    if page_size & (page_size - 1):
        raise ValueError(f"{pages_pkbd.shape=}: the page size {page_size} is not a power of two")
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads (q_tnh) are not a multiple of {num_kv_heads} KV heads (pages_pkbd)")
    if q_start_s.shape[0] != num_rows + 1 or table_sm.shape[0] != num_rows:
        raise ValueError(
            f"{q_start_s.shape=} must be one longer than {kv_len_s.shape=}, and {table_sm.shape=} have a row for each"
        )
    if pages_pkbd.dtype != kv_dtype and pages_pkbd.dtype.itemsize != kv_dtype.itemsize:
        raise ValueError(f"{kv_dtype=} does not have the width of {pages_pkbd.dtype=}")
    if sinks_n is not None and sinks_n.shape != (num_heads,):
        raise ValueError(f"{sinks_n.shape=} must be ({num_heads},), one per query head")
    if kv_scale_2k is not None and kv_scale_2k.shape != (2, num_kv_heads):
        raise ValueError(f"{kv_scale_2k.shape=} must be (2, {num_kv_heads}), for keys and values of each KV head")
    if kv_scale_2k is None and jnp.issubdtype(kv_dtype, jnp.signedinteger):
        raise ValueError(f"kv_scale_2k is needed for a pool of {kv_dtype}")


def chosen(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    page_size: int,
    dtype: jnp.dtype,
    kv_dtype: jnp.dtype,
    pool_dtype: jnp.dtype,
    window: int | None = None,
    impl: str | None = None,
) -> str:
    """The name of the implementation that a model's calls take: each is asked by tracing a small call.

    Raises: NotImplementedError, with the reason, if the one asked for by name refuses; ExceptionGroup if all do.
    """
    shape = jax.ShapeDtypeStruct
    new = shape((8, num_kv_heads, head_size), dtype)
    arrays = {
        "q_tnh": shape((8, num_heads, head_size), dtype),
        "k_tkh": new,
        "v_tkh": new,
        "pages_pkbd": shape((8, num_kv_heads, page_size, 2 * head_size), pool_dtype),
        "table_sm": shape((4, 8), jnp.int32),
        "q_start_s": shape((5,), jnp.int32),
        "kv_len_s": shape((4,), jnp.int32),
    }

    def taken(name: str) -> str:
        jax.eval_shape(
            functools.partial(ragged_paged_attention, scale=1.0, window=window, kv_dtype=kv_dtype, impl=name), **arrays
        )
        return name

    names = tried(IMPLEMENTATIONS, ORDER, impl)
    return dispatch("ragged_paged_attention", {name: functools.partial(taken, name) for name in names}, impl)


__all__ = ["IMPLEMENTATIONS", "Attended", "chosen", "ragged_paged_attention"]
