"""Attention of a ragged batch of queries over a paged KV pool: prefill, chunks and decodes in one call."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxserve.pallas_kernels.dispatch import dispatch
from jaxserve.pallas_kernels.ragged_paged_attention import cpu, ref, xla

IMPLEMENTATIONS = {"cpu": cpu.attend, "xla": xla.attend, "ref": ref.attend}


def ragged_paged_attention(
    q_tnh: Float[Array, "t n h"],
    k_tkh: Float[Array, "t k h"],
    v_tkh: Float[Array, "t k h"],
    pages_pk2bh: Shaped[Array, "p k 2 b h"],
    table_sm: Int[Array, "s m"],
    q_start_s: Int[Array, " s1"],
    kv_len_s: Int[Array, " s"],
    *,
    scale: float,
    window: int | None = None,
    max_q_len: int | None = None,
    kv_dtype: jnp.dtype | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "t n h"], Shaped[Array, "p k 2 b h"]]:
    """Store the new keys and values in their pages, then attend causally from every query over its row's pages.

    Writing is part of the operation because only an implementation knows how to do it without copying the pool: the
    returned pages reuse the buffer of `pages_pk2bh` when the enclosing jit may (donate it).

    Args:
      q_tnh: queries, rotated, not scaled; n is a multiple of the k KV heads, query head i reads KV head i // (n // k).
      k_tkh, v_tkh: keys (rotated) and values of the same tokens; cast to the pool's dtype.
      pages_pk2bh: the pool; `[:, :, 0]` keys, `[:, :, 1]` values. Slots past a row's length are never used.
      table_sm: page ids of each row in order of position. Entries past a row's length may hold anything.
      q_start_s: i32[s + 1], where each row's tokens begin in q, ascending; the last entry ends the last row. Tokens past
        it are padding, and their output is unspecified but finite.
      kv_len_s: tokens of each row, this step's included; its queries are the last ones. 0 for an empty row.
      scale: factor of q . k before the softmax (static).
      window: attend only to the last `window` positions, the query's own included; None for all (static).
      max_q_len: 1 promises that no row has more than one query; None promises nothing (static).
      kv_dtype: what the pool holds, when its array type is an unsigned integer of the same width (static). A pool kept as
        bits is faster on CPU; see `xla.py`.
      impl: "cpu" (our own, with AVX-512), "xla", "ref", or None for the first that takes the case (static).

    Returns: float[t n h] in q's dtype (softmax and sums are computed in float32), and the pool.

    Source: paging, arXiv 2309.06180; softmax over blocks with a running maximum, arXiv 2205.14135.
    """
    if q_start_s.shape[0] != kv_len_s.shape[0] + 1 or table_sm.shape[0] != kv_len_s.shape[0]:
        raise ValueError(
            f"{q_start_s.shape=} must be one longer than {kv_len_s.shape=}, and {table_sm.shape=} have a row for each"
        )
    if q_tnh.shape[1] % pages_pk2bh.shape[1]:
        raise ValueError(f"{q_tnh.shape[1]} query heads are not a multiple of {pages_pk2bh.shape[1]} KV heads")
    return dispatch(
        "ragged_paged_attention",
        IMPLEMENTATIONS,
        impl,
        q_tnh,
        k_tkh,
        v_tkh,
        pages_pk2bh,
        table_sm,
        q_start_s,
        kv_len_s,
        scale=scale,
        window=window,
        max_q_len=max_q_len,
        kv_dtype=jnp.dtype(kv_dtype or pages_pk2bh.dtype),
    )


def chosen(dtype: jnp.dtype, kv_dtype: jnp.dtype, head_size: int, impl: str | None = None) -> str:
    """The name of the implementation that a model's calls take."""
    return impl or ("xla" if cpu.refusal(dtype, kv_dtype, head_size) else "cpu")


__all__ = ["IMPLEMENTATIONS", "chosen", "ragged_paged_attention"]
