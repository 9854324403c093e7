"""Storing keys and values without attending to them: for prompts whose attention is computed without pages."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxserve.pallas_kernels.dispatch import dispatch, tried
from jaxserve.pallas_kernels.ragged_paged_attention import xla
from jaxserve.pallas_kernels.ragged_paged_attention.signature import Rows, to_pool


def _on_tpu(pages_pkbd, new_tkd, rows: Rows):
    from jaxserve.pallas_kernels.ragged_paged_attention import tpu, tpu_write  # not at the top: see `op.py`

    tpu.refuse_pool(pages_pkbd, new_tkd.dtype, rows)
    return tpu_write.write(pages_pkbd, new_tkd, rows)


IMPLEMENTATIONS = {"tpu": _on_tpu, "xla": xla.write}
ORDER = {"tpu": ("tpu", "xla"), "gpu": ("xla",), "cpu": ("xla",)}  # what is tried, by platform


def store_pages(
    k_tkh: Float[Array, "t k h"],
    v_tkh: Float[Array, "t k h"],
    pages_pkbd: Shaped[Array, "p k b d"],
    table_sm: Int[Array, "s m"],
    q_start_s: Int[Array, " s1"],
    kv_len_s: Int[Array, " s"],
    *,
    kv_dtype: jnp.dtype | None = None,
    impl: str | None = None,
) -> jax.Array:
    """The pool with new keys and values in their pages, in its old place when the enclosing jit may (donate it).

    Arguments are those of `op.ragged_paged_attention`; pools with scales are not served.
    """
    kv_dtype = jnp.dtype(kv_dtype or pages_pkbd.dtype)
    spare = pages_pkbd.shape[3] // 2 - k_tkh.shape[2]
    k_tkh, v_tkh = (jnp.pad(x, ((0, 0), (0, 0), (0, spare))) for x in (k_tkh, v_tkh))
    return dispatch(
        "store_pages",
        tried(IMPLEMENTATIONS, ORDER, impl),
        impl,
        pages_pkbd,
        to_pool(k_tkh, v_tkh, kv_dtype, None),
        Rows(table_sm, q_start_s, kv_len_s),
    )
