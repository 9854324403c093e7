"""The formula, in float32, one query token at a time. Slow and obvious; shares nothing with the other backends."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.ragged_paged_attention.signature import Attended, Extras, Options, Rows, to_pool


def attend(q_tnh, k_tkh, v_tkh, pages_pkbd, rows: Rows, extras: Extras, options: Options) -> Attended:
    """See `op.ragged_paged_attention`. Gathers each token's whole context: memory grows as tokens x context."""
    num_tokens, num_heads, head_size = q_tnh.shape
    num_kv_heads, block_size = pages_pkbd.shape[1:3]
    context = rows.table_sm.shape[1] * block_size
    where = jnp.arange(context)
    new_tkd = to_pool(k_tkh, v_tkh, options.kv_dtype, extras.kv_scale_2k)

    def row_and_position(token):
        """Row of a token and its position in the sequence; padding tokens get position -1, which sees nothing."""
        row = jnp.sum(token >= rows.q_start_s[1:])  # rows that end before this token
        row = jnp.minimum(row, rows.kv_len_s.shape[0] - 1)
        position = rows.kv_len_s[row] - (rows.q_start_s[row + 1] - token)
        return row, jnp.where(token < rows.q_start_s[-1], position, -1)

    def store(token, pages):
        row, position = row_and_position(token)
        page = rows.table_sm[row, jnp.maximum(position, 0) // block_size]
        return jnp.where(position >= 0, pages.at[page, :, position % block_size].set(new_tkd[token]), pages)

    def one_token(token, q_nh, pages):
        row, position = row_and_position(token)
        kv_mkbd = pages[jnp.clip(rows.table_sm[row], 0, pages.shape[0] - 1)].astype(jnp.float32)
        kv_ckd = jnp.transpose(kv_mkbd, (0, 2, 1, 3)).reshape(context, num_kv_heads, 2 * head_size)
        k_ckh, v_ckh = kv_ckd[..., :head_size], kv_ckd[..., head_size:]
        if extras.kv_scale_2k is not None:
            k_ckh = k_ckh * extras.kv_scale_2k[0][None, :, None]
            v_ckh = v_ckh * extras.kv_scale_2k[1][None, :, None]
        group = num_heads // num_kv_heads
        k_cnh, v_cnh = jnp.repeat(k_ckh, group, axis=1), jnp.repeat(v_ckh, group, axis=1)
        seen_c = where <= position
        if options.window is not None:
            seen_c = seen_c & (where > position - options.window)
        scores_nc = jnp.einsum("nh,cnh->nc", q_nh.astype(jnp.float32), k_cnh, precision="highest") * options.scale
        if options.soft_cap is not None:
            scores_nc = options.soft_cap * jnp.tanh(scores_nc / options.soft_cap)
        scores_nc = jnp.where(seen_c[None, :], scores_nc, -jnp.inf)
        if extras.sinks_n is not None:
            scores_nc = jnp.concatenate([scores_nc, extras.sinks_n.astype(jnp.float32)[:, None]], axis=1)
        top_n1 = jnp.max(scores_nc, axis=1, keepdims=True)
        weights_nc = jnp.exp(scores_nc - jnp.where(jnp.isfinite(top_n1), top_n1, 0.0))
        total_n = jnp.sum(weights_nc, axis=1)
        weights_nc = weights_nc[:, :context] / jnp.where(total_n > 0, total_n, 1.0)[:, None]
        seen_cnh = jnp.where(seen_c[:, None, None], v_cnh, 0.0)
        out_nh = jnp.einsum("nc,cnh->nh", weights_nc, seen_cnh, precision="highest")
        return out_nh, jnp.log(total_n) + top_n1[:, 0]

    pages = jax.lax.bitcast_convert_type(pages_pkbd, options.kv_dtype)
    pages = jax.lax.fori_loop(0, num_tokens, store, pages)
    out_tnh, lse_tn = jax.vmap(one_token, in_axes=(0, 0, None))(jnp.arange(num_tokens), q_tnh, pages)
    return Attended(
        out_tnh.astype(q_tnh.dtype),
        jax.lax.bitcast_convert_type(pages, pages_pkbd.dtype),
        lse_tn if options.wants_lse else None,
    )
