"""Linear attention of a prompt whose tokens are split over devices: one collective of states, whatever the prompt's length.

Without a softmax all that a token needs of those before it is one matrix for each head, the sum of k v^T: the state. Each
device sums its own tokens' first, so that the states are under way while it attends within its share.

Source: LASP-2, arXiv 2502.07563; with decay as RetNet (arXiv 2307.08621) and Mamba-2 (arXiv 2405.21060) have it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.pallas_kernels.platform import precision_of
from jaxserve.sharding.collectives import gather, num_shards, shard_index, sum_over
from jaxserve.sharding.layout import AXIS

BLOCK = 128  # tokens that are multiplied with each other; blocks are linked by states

_F32 = {"precision": precision_of(jnp.dtype(jnp.float32)), "preferred_element_type": jnp.float32}


def linear_attention(
    q_tnh: Float[Array, "t n h"],
    k_tkh: Float[Array, "t k h"],
    v_tkd: Float[Array, "t k d"],
    length: Int[Array, ""],
    *,
    decay_tk: Float[Array, "t k"] | None = None,
    state_khd: Float[Array, "k h d"] | None = None,
    causal: bool = True,
) -> tuple[Float[Array, "t n d"], Float[Array, "k h d"]]:
    """For each token the sum of (q . k) v over itself and those before it, each weighted by the decays since.

    Device i of the P that share the logical axis "tokens" has tokens i t .. (i + 1) t - 1, and gets their results. Causal:
    one all-gather of k (h d + 1) floats from each device, without decay k h d; else one all-reduce of k h d.

    Args:
      q_tnh, k_tkh: this device's queries and keys, after the feature map; query head i reads KV head i // (n // k).
      v_tkd: its values.
      length: i32[], tokens of the whole prompt; those behind it are padding, which changes no state.
      decay_tk: from 0 to 1, what a token leaves of the state before it; 0 forgets all: the first token of another request.
        None for 1.
      state_khd: f32, the state before the first token; None for zeros.
      causal: no token sees later ones (static). If not, there is neither decay nor a state before.

    Returns: float[t n d] in q's dtype, not normalised, padding's unspecified but finite; and f32[k h d], the state after the
    last token (of the last request, where there are several), on all devices: what `decode_step` goes on with.

    Raises: ValueError for decay or a state without `causal`.
    """
    if not causal and (decay_tk is not None or state_khd is not None):
        raise ValueError(f"{causal=} takes neither decay_tk nor state_khd: a token would see those behind it undecayed")
    num_tokens, num_kv_heads, _ = k_tkh.shape
    position_t = shard_index(AXIS) * num_tokens + jnp.arange(num_tokens, dtype=jnp.int32)
    is_real_t = position_t < length
    k_tkh, v_tkd = (jnp.where(is_real_t[:, None, None], x, jnp.zeros((), x.dtype)) for x in (k_tkh, v_tkd))
    q_tkgh = q_tnh.reshape(num_tokens, num_kv_heads, -1, q_tnh.shape[2])
    if not causal:
        state_khd = sum_over(AXIS, _outer(k_tkh, v_tkd))
        out_tkgd = jnp.einsum("tkgh,khd->tkgd", q_tkgh.astype(jnp.float32), state_khd, **_F32)
        return out_tkgd.reshape(*q_tnh.shape[:2], -1).astype(q_tnh.dtype), state_khd
    if decay_tk is not None:
        decay_tk = jnp.where(is_real_t[:, None], decay_tk.astype(jnp.float32), 1.0)
    before_khd, after_khd = _states_around(k_tkh, v_tkd, decay_tk, state_khd)
    out_tkgd = _within(q_tkgh, k_tkh, v_tkd, decay_tk)
    from_before = jnp.einsum("tkgh,khd->tkgd", q_tkgh.astype(jnp.float32), before_khd, **_F32)
    if decay_tk is not None:
        from_before = from_before * _since_start(decay_tk)[:, :, None, None]
    return (out_tkgd + from_before).reshape(*q_tnh.shape[:2], -1).astype(q_tnh.dtype), after_khd


def decode_step(
    q_snh: Float[Array, "s n h"],
    k_skh: Float[Array, "s k h"],
    v_skd: Float[Array, "s k d"],
    state_skhd: Float[Array, "s k h d"],
    *,
    decay_sk: Float[Array, "s k"] | None = None,
) -> tuple[Float[Array, "s n d"], Float[Array, "s k h d"]]:
    """One more token of each of s sequences. Returns its result, in q's dtype, and the states after it, float32."""
    added_skhd = jnp.einsum("skh,skd->skhd", k_skh.astype(jnp.float32), v_skd.astype(jnp.float32), **_F32)
    if decay_sk is not None:
        state_skhd = state_skhd * decay_sk.astype(jnp.float32)[..., None, None]
    state_skhd = state_skhd + added_skhd
    q_skgh = q_snh.astype(jnp.float32).reshape(*k_skh.shape[:2], -1, q_snh.shape[2])
    out_skgd = jnp.einsum("skgh,skhd->skgd", q_skgh, state_skhd, **_F32)
    return out_skgd.reshape(*q_snh.shape[:2], -1).astype(q_snh.dtype), state_skhd


def _states_around(
    k_tkh: jax.Array, v_tkd: jax.Array, decay_tk: jax.Array | None, first_khd: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The states before this device's tokens, and after those of all devices."""
    num_kv_heads, key_size, value_size = *k_tkh.shape[1:], v_tkd.shape[2]
    shape = (num_kv_heads, key_size, value_size)
    own_kx = _outer(k_tkh, v_tkd, decay_tk).reshape(num_kv_heads, -1)
    if decay_tk is not None:  # one piece, one collective
        own_kx = jnp.concatenate([own_kx, jnp.prod(decay_tk, axis=0)[:, None]], axis=1)
    all_pkx = gather(AXIS, own_kx[None], axis=0)
    me = shard_index(AXIS)
    state_khd = jnp.zeros(shape, jnp.float32) if first_khd is None else first_khd
    before_khd = state_khd
    for device in range(num_shards(AXIS)):
        before_khd = jnp.where(me == device, state_khd, before_khd)
        theirs_kx = all_pkx[device]
        if decay_tk is not None:
            state_khd = state_khd * theirs_kx[:, -1][:, None, None]
            theirs_kx = theirs_kx[:, :-1]
        state_khd = state_khd + theirs_kx.reshape(shape)
    return before_khd, state_khd


def _within(q_tkgh: jax.Array, k_tkh: jax.Array, v_tkd: jax.Array, decay_tk: jax.Array | None) -> jax.Array:
    """The part of this device's own tokens, f32[t k g d]: in blocks, with a state that runs along."""
    num_tokens, num_kv_heads, group, key_size = q_tkgh.shape
    block = min(BLOCK, num_tokens)

    def blocks(x, fill=0):
        spare = -num_tokens % block
        x = jnp.pad(x, ((0, spare), *((0, 0) for _ in x.shape[1:])), constant_values=fill)
        return x.reshape(-1, block, *x.shape[1:])

    is_before_ij = jnp.tril(jnp.ones((block, block), bool))
    exact = {"precision": precision_of(q_tkgh.dtype), "preferred_element_type": jnp.float32}

    def one_block(state_khd, args):
        q_ikgh, k_jkh, v_jkd, decay_jk = args
        scores_kgij = jnp.einsum("ikgh,jkh->kgij", q_ikgh, k_jkh, **exact)
        from_before = jnp.einsum("ikgh,khd->ikgd", q_ikgh.astype(jnp.float32), state_khd, **_F32)
        if decay_jk is None:
            scores_kgij = jnp.where(is_before_ij, scores_kgij, 0.0)
            state_khd = state_khd + _outer(k_jkh, v_jkd)
        else:
            scores_kgij = scores_kgij * _between(decay_jk)[:, None]
            from_before = from_before * _since_start(decay_jk)[:, :, None, None]
            state_khd = state_khd * jnp.prod(decay_jk, axis=0)[:, None, None] + _outer(k_jkh, v_jkd, decay_jk)
        own = jnp.einsum("kgij,jkd->ikgd", scores_kgij, v_jkd.astype(jnp.float32), **_F32)
        return state_khd, own + from_before

    nothing = jnp.zeros((num_kv_heads, key_size, v_tkd.shape[2]), jnp.float32)
    decays = None if decay_tk is None else blocks(decay_tk, 1)
    _, out = lax.scan(one_block, nothing, (blocks(q_tkgh), blocks(k_tkh), blocks(v_tkd), decays))
    return out.reshape(-1, num_kv_heads, group, v_tkd.shape[2])[:num_tokens]


def _outer(k_tkh: jax.Array, v_tkd: jax.Array, decay_tk: jax.Array | None = None) -> jax.Array:
    """The sum of k v^T over tokens, f32[k h d]: what they add to a state."""
    k_tkh = k_tkh.astype(jnp.float32)
    if decay_tk is not None:
        k_tkh = k_tkh * _until_end(decay_tk)[..., None]
    return jnp.einsum("tkh,tkd->khd", k_tkh, v_tkd.astype(jnp.float32), **_F32)


def _since_start(decay_tk: jax.Array) -> jax.Array:
    """What each token leaves of the state before the first: the product of decays up to it."""
    return jnp.cumprod(decay_tk, axis=0)


def _until_end(decay_tk: jax.Array) -> jax.Array:
    """What is left of each token after the last: the product of decays behind it."""
    behind_tk = jnp.concatenate([decay_tk[1:], jnp.ones_like(decay_tk[:1])])
    return jnp.flip(jnp.cumprod(jnp.flip(behind_tk, 0), axis=0), 0)


def _between(decay_jk: jax.Array) -> jax.Array:
    """f32[k i j]: what is left of token j at token i, 0 where j is later.

    By logarithms, since a quotient of products would underflow; zeros are counted instead, for they have none.
    """
    is_zero_jk = decay_jk == 0
    log_jk = jnp.cumsum(jnp.log(jnp.where(is_zero_jk, 1.0, decay_jk)), axis=0)
    zeros_jk = jnp.cumsum(is_zero_jk, axis=0, dtype=jnp.int32)
    log_kij = log_jk.T[:, :, None] - log_jk.T[:, None, :]
    is_left_kij = (zeros_jk.T[:, :, None] == zeros_jk.T[:, None, :]) & jnp.tril(jnp.ones((len(log_jk),) * 2, bool))[
        None
    ]
    return jnp.where(is_left_kij, jnp.exp(jnp.where(is_left_kij, log_kij, 0.0)), 0.0)
