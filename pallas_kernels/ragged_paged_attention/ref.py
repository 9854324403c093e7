"""The formula, in float32, one query token at a time. Slow and obvious; shares nothing with the other backends."""

import jax
import jax.numpy as jnp


def attend(q_tnh, k_tkh, v_tkh, pages_pk2bh, table_sm, q_start_s, kv_len_s, *, scale, window, max_q_len, kv_dtype):
    """See `op.ragged_paged_attention`. Gathers each token's whole context: memory grows as tokens x context."""
    del max_q_len
    num_tokens, num_heads, head_size = q_tnh.shape
    num_kv_heads, block_size = pages_pk2bh.shape[1], pages_pk2bh.shape[3]
    context = table_sm.shape[1] * block_size
    where = jnp.arange(context)

    def row_and_position(token):
        """Row of a token and its position in the sequence; padding tokens get position -1, which sees nothing."""
        row = jnp.sum(token >= q_start_s[1:])  # rows that end before this token
        row = jnp.minimum(row, kv_len_s.shape[0] - 1)
        position = kv_len_s[row] - (q_start_s[row + 1] - token)
        return row, jnp.where(token < q_start_s[-1], position, -1)

    def store(token, pages):
        row, position = row_and_position(token)
        page = table_sm[row, jnp.maximum(position, 0) // block_size]
        new_k2h = jnp.stack([k_tkh[token], v_tkh[token]], axis=1).astype(kv_dtype)
        return jnp.where(position >= 0, pages.at[page, :, :, position % block_size].set(new_k2h), pages)

    def one_token(token, q_nh, pages):
        row, position = row_and_position(token)
        kv_mk2bh = pages[jnp.clip(table_sm[row], 0, pages.shape[0] - 1)].astype(jnp.float32)
        k_ckh = jnp.transpose(kv_mk2bh[:, :, 0], (0, 2, 1, 3)).reshape(context, num_kv_heads, head_size)
        v_ckh = jnp.transpose(kv_mk2bh[:, :, 1], (0, 2, 1, 3)).reshape(context, num_kv_heads, head_size)
        group = num_heads // num_kv_heads
        k_cnh, v_cnh = jnp.repeat(k_ckh, group, axis=1), jnp.repeat(v_ckh, group, axis=1)
        seen_c = where <= position
        if window is not None:
            seen_c = seen_c & (where > position - window)
        scores_nc = jnp.einsum("nh,cnh->nc", q_nh.astype(jnp.float32), k_cnh) * scale
        scores_nc = jnp.where(seen_c[None, :], scores_nc, -jnp.inf)
        top_n1 = jnp.max(scores_nc, axis=1, keepdims=True)
        weights_nc = jnp.exp(scores_nc - jnp.where(jnp.isfinite(top_n1), top_n1, 0.0))
        total_n1 = jnp.sum(weights_nc, axis=1, keepdims=True)
        weights_nc = weights_nc / jnp.where(total_n1 > 0, total_n1, 1.0)
        return jnp.einsum("nc,cnh->nh", weights_nc, jnp.where(seen_c[:, None, None], v_cnh, 0.0))

    pages = jax.lax.fori_loop(0, num_tokens, store, jax.lax.bitcast_convert_type(pages_pk2bh, kv_dtype))
    out_tnh = jax.vmap(one_token, in_axes=(0, 0, None))(jnp.arange(num_tokens), q_tnh, pages)
    return out_tnh.astype(q_tnh.dtype), jax.lax.bitcast_convert_type(pages, pages_pk2bh.dtype)
