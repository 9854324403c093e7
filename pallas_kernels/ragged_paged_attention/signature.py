"""What every implementation takes and returns. `op.py` says what the values mean."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.ragged_paged_attention.tiles import row_of


class Rows(NamedTuple):
    """Where the tokens of each row lie."""

    table_sm: jax.Array  # i32[s m]
    q_start_s: jax.Array  # i32[s + 1]
    kv_len_s: jax.Array  # i32[s]

    @property
    def q_len_s(self) -> jax.Array:
        """i32[s]; queries of each row."""
        return self.q_start_s[1:] - self.q_start_s[:-1]

    def of_token(self, num_tokens: int) -> jax.Array:
        """i32[t]; row of each token. Tokens past the last row get the last row."""
        return row_of(jnp.arange(num_tokens, dtype=jnp.int32), self.q_start_s[1:])


class Extras(NamedTuple):
    """Arrays that only some models have."""

    sinks_n: jax.Array | None  # f32[n]
    kv_scale_2k: jax.Array | None  # f32[2 k]; of keys and of values


class Options(NamedTuple):
    """What is fixed when a call is compiled."""

    scale: float
    window: int | None
    soft_cap: float | None
    max_q_len: int | None
    kv_dtype: jnp.dtype
    wants_lse: bool


class Attended(NamedTuple):
    """What a call returns."""

    out_tnh: jax.Array  # in q's dtype
    pages_pkbd: jax.Array
    lse_tn: jax.Array | None  # f32


def dot_dtype(dtype: jnp.dtype, kv_dtype: jnp.dtype) -> jnp.dtype:
    """Of the factors of both products: bfloat16 where neither queries nor pool hold more."""
    is_narrow = dtype == jnp.bfloat16 and kv_dtype not in (jnp.float32, jnp.float16)
    return jnp.dtype(jnp.bfloat16 if is_narrow else jnp.float32)


def to_pool(k_tkh: jax.Array, v_tkh: jax.Array, kv_dtype: jnp.dtype, kv_scale_2k: jax.Array | None) -> jax.Array:
    """New keys and values side by side, [t k d], as the pool holds them: divided by their scale, rounded, clipped."""
    pair = [k_tkh, v_tkh]
    if kv_scale_2k is not None:
        pair = [x_tkh.astype(jnp.float32) / kv_scale_2k[i][None, :, None] for i, x_tkh in enumerate(pair)]
    kv_tkd = jnp.concatenate(pair, axis=2)
    if jnp.issubdtype(kv_dtype, jnp.integer):
        limits = jnp.iinfo(kv_dtype)
        kv_tkd = jnp.clip(jnp.round(kv_tkd), limits.min, limits.max)
    elif kv_dtype.itemsize == 1:
        largest = float(jnp.finfo(kv_dtype).max)  # beyond it a float8 becomes nan
        kv_tkd = jnp.clip(kv_tkd, -largest, largest)
    return kv_tkd.astype(kv_dtype)
