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
from jaxserve.pallas_kernels.ragged_paged_attention.store import store_pages
from jaxserve.sharding.collectives import exchange, part_of
from jaxserve.sharding.prefill import prefill_attention


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
    if batch.scheme is not None:
        return _attend_whole(layer, cfg, index, x_te, rotation, batch, kv, batch.scheme)
    qkv_tkjh = exchange("tokens", _project(layer, cfg, x_te), split=1, join=0)
    q_tnh, k_tkh, v_tkh = _heads(layer, cfg, qkv_tkjh, rotation)
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
            window=_window(cfg, index),
            max_q_len=batch.max_q_len,
            kv_dtype=kv.dtype,
            impl=impl,
        )
    out_tnh = exchange("tokens", done.out_tnh, split=0, join=1)
    return _side_by_side(out_tnh), dataclasses.replace(kv, pages_pkbd=done.pages_pkbd)


def _attend_whole(
    layer: Any,
    cfg: ModelConfig,
    index: int,
    x_te: Float[Array, "t e"],
    rotation: tuple[jax.Array, jax.Array],
    batch: TokenBatch[jax.Array],
    kv: KVPages[jax.Array],
    scheme: str,
) -> tuple[Float[Array, "t nh"], KVPages[jax.Array]]:
    """The same for a prompt that is alone in its step: nothing of it is in the pool yet, so tokens need not be exchanged for
    heads, but for what is stored."""
    cos_th, sin_th = (part_of("tokens", x) for x in rotation)
    q_tnh, k_tkh, v_tkh = _heads(layer, cfg, _project(layer, cfg, x_te), (cos_th, sin_th))
    with jax.named_scope("attention"):
        out_tnh = prefill_attention(
            q_tnh,
            k_tkh,
            v_tkh,
            batch.q_start_s[-1],
            scale=cfg.head_size**-0.5,
            scheme=scheme,
            window=_window(cfg, index),
        )
        pages = store_pages(
            exchange("tokens", k_tkh, split=1, join=0),
            exchange("tokens", v_tkh, split=1, join=0),
            kv.pages_pkbd,
            batch.table_sm * kv.num_layers + index,
            batch.q_start_s,
            batch.kv_len_s,
            kv_dtype=kv.dtype,
        )
    return _side_by_side(out_tnh), dataclasses.replace(kv, pages_pkbd=pages)


def _project(layer: Any, cfg: ModelConfig, x_te: Float[Array, "t e"]) -> Float[Array, "t k j h"]:
    """Queries, key and value of each KV head, from the fused weight."""
    x_te = rms_norm(x_te, layer.attn_norm_e, cfg.norm_eps)
    num_kv_heads, width, head_size, embed_size = layer.qkv_kjhe.shape
    rows = num_kv_heads * width * head_size
    bias = None if layer.qkv_bias_kjh is None else layer.qkv_bias_kjh.reshape(rows)
    return linear(x_te, layer.qkv_kjhe.reshape(rows, embed_size), bias).reshape(-1, num_kv_heads, width, head_size)


def _heads(
    layer: Any, cfg: ModelConfig, qkv_tkjh: Float[Array, "t k j h"], rotation: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [t n h], keys [t k h], both rotated, and values [t k h]; norms of q and k where the family has them."""
    num_tokens, _, width, head_size = qkv_tkjh.shape
    group = width - 2
    q_tnh = qkv_tkjh[:, :, :group].reshape(num_tokens, -1, head_size)
    k_tkh, v_tkh = qkv_tkjh[:, :, group], qkv_tkjh[:, :, group + 1]
    if layer.q_norm_h is not None:
        q_tnh = rms_norm(q_tnh, layer.q_norm_h, cfg.norm_eps)
        k_tkh = rms_norm(k_tkh, layer.k_norm_h, cfg.norm_eps)
    return rotate(q_tnh, *rotation), rotate(k_tkh, *rotation), v_tkh


def _side_by_side(out_tnh: Float[Array, "t n h"]) -> Float[Array, "t nh"]:
    return out_tnh.reshape(len(out_tnh), -1)


def _window(cfg: ModelConfig, index: int) -> int | None:
    return cfg.windows[index] if cfg.windows else None
