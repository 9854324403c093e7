"""The attention of a decoder layer, up to its output projection; the one caller of the attention kernels."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxserve.models.batch import TokenBatch
from jaxserve.models.config import ModelConfig
from jaxserve.models.kv import KVPages
from jaxserve.models.layers import linear, rms_norm
from jaxserve.models.rope import rotate
from jaxserve.pallas_kernels.ragged_paged_attention.op import ragged_paged_attention
from jaxserve.sharding.collectives import exchange


def attend(
    layer: Any,
    cfg: ModelConfig,
    index: int,
    x_te: Float[Array, "t e"],
    rotation: tuple[jax.Array, jax.Array],
    batch: TokenBatch[jax.Array],
    kv: KVPages[jax.Array],
    impl: str | None,
) -> tuple[Float[Array, "t nh"], KVPages[jax.Array]]:
    """Normalise, project, rotate, store keys and values of layer `index`, attend over the row's pages.

    Where devices share a step's tokens, each projects its own, and attends for all of them with its part of the heads
    (Ulysses, arXiv 2309.14509): the heads of the pool lie on these devices too, so every kind of row is served.

    Returns: this device's heads of its tokens, side by side, and the pool.
    """
    q_tnh, k_tkh, v_tkh = _project(layer, cfg, rms_norm(x_te, layer.attn_norm_e, cfg.norm_eps))
    q_tnh, k_tkh = rotate(q_tnh, *rotation), rotate(k_tkh, *rotation)
    with jax.named_scope("attention"):
        done = ragged_paged_attention(
            q_tnh,
            k_tkh,
            v_tkh,
            kv.pages_pkbd,
            batch.table_sm * kv.num_layers + index,
            batch.q_start_s,
            batch.kv_len_s,
            scale=cfg.head_size**-0.5,
            window=cfg.windows[index] if cfg.windows else None,
            max_q_len=batch.max_q_len,
            kv_dtype=kv.dtype,
            impl=impl,
        )
    out_tnh = exchange("tokens", done.out_tnh, split=0, join=1)
    heads_tm = out_tnh.reshape(-1, out_tnh.shape[1] * cfg.head_size)
    return heads_tm, dataclasses.replace(kv, pages_pkbd=done.pages_pkbd)


def _project(layer: Any, cfg: ModelConfig, x_te: Float[Array, "t e"]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [t n h], keys [t k h] and values [t k h] from the fused weight; norms of q and k where the family has them."""
    num_kv_heads, width, head_size, embed_size = layer.qkv_kjhe.shape
    rows = num_kv_heads * width * head_size
    bias = None if layer.qkv_bias_kjh is None else layer.qkv_bias_kjh.reshape(rows)
    fused = linear(x_te, layer.qkv_kjhe.reshape(rows, embed_size), bias)
    qkv_tkjh = exchange("tokens", fused.reshape(-1, num_kv_heads, width, head_size), split=1, join=0)
    group = width - 2
    q_tnh = qkv_tkjh[:, :, :group].reshape(len(qkv_tkjh), -1, head_size)
    k_tkh, v_tkh = qkv_tkjh[:, :, group], qkv_tkjh[:, :, group + 1]
    if layer.q_norm_h is not None:
        q_tnh = rms_norm(q_tnh, layer.q_norm_h, cfg.norm_eps)
        k_tkh = rms_norm(k_tkh, layer.k_norm_h, cfg.norm_eps)
    return q_tnh, k_tkh, v_tkh
