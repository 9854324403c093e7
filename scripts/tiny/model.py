"""A compact dense batched Llama forward in jnp, used only for training and for checking `tiny`.

It is written apart from the serving code on purpose: the same weights give a second opinion.
Weights live in a flat dict whose keys are the Hugging Face tensor names; matrices are kept as [in, out]
here and transposed at export.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Config(NamedTuple):
    """Sizes of the network. `dim` is the width of the residual stream."""

    vocab: int = 1024
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 384
    theta: float = 10000.0
    eps: float = 1e-5
    max_len: int = 2048


MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def layer_shapes(cfg: Config) -> dict[str, tuple[int, int]]:
    """[in, out] shape of every matrix of one layer."""
    q, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    sizes = [(cfg.dim, q), (cfg.dim, kv), (cfg.dim, kv), (q, cfg.dim)]
    sizes += [(cfg.dim, cfg.ffn), (cfg.dim, cfg.ffn), (cfg.ffn, cfg.dim)]
    return dict(zip(MATRICES, sizes, strict=True))


def init(cfg: Config, key: jax.Array) -> dict[str, jax.Array]:
    """Random float32 weights: normal with std 1/sqrt(in), outputs to the residual stream scaled down."""
    params = {}
    key, sub = jax.random.split(key)
    params["model.embed_tokens.weight"] = 0.02 * jax.random.normal(sub, (cfg.vocab, cfg.dim))
    for i in range(cfg.layers):
        for name, shape in layer_shapes(cfg).items():
            key, sub = jax.random.split(key)
            scale = shape[0] ** -0.5
            if name.endswith(("o_proj", "down_proj")):
                scale *= (2 * cfg.layers) ** -0.5
            params[f"model.layers.{i}.{name}.weight"] = scale * jax.random.normal(sub, shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            params[f"model.layers.{i}.{name}.weight"] = jnp.ones(cfg.dim)
    params["model.norm.weight"] = jnp.ones(cfg.dim)
    return params


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x: [..., dim] scaled to unit mean square, then by weight [dim]."""
    weight = weight.reshape((1,) * (x.ndim - 1) + weight.shape)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope(x: jax.Array, theta: float) -> jax.Array:
    """Rotate halves of x [batch, heads, length, head_dim] by position 0..length-1 (Hugging Face layout)."""
    length, half = x.shape[2], x.shape[3] // 2
    freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (jnp.arange(length, dtype=jnp.float32)[:, None] * freq[None])[None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, keep: jax.Array | None, chunk: int = 256) -> jax.Array:
    """Causal grouped-query attention.

    q: [batch, kv_heads, group, length, head_dim]; k, v: [batch, kv_heads, length, head_dim].
    keep: optional bool [length, length]; True entries may be attended to (ablations), on top of causality.
    Queries go in chunks that only see the keys up to their end: about half of the score matrix is never made.
    """
    length, head_dim = k.shape[2], k.shape[3]
    q = q * head_dim**-0.5
    out = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        scores = jnp.einsum("bhgqd,bhkd->bhgqk", q[:, :, :, start:stop], k[:, :, :stop])
        mask = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        if keep is not None:
            mask &= keep[start:stop, :stop]
        weights = jax.nn.softmax(jnp.where(mask[None, None, None], scores, -1e30), axis=-1)
        out.append(jnp.einsum("bhgqk,bhkd->bhgqd", weights, v[:, :, :stop]))
    return jnp.concatenate(out, axis=3)


def forward(
    params: dict[str, jax.Array], tokens: jax.Array, cfg: Config, keep: dict[int, jax.Array] | None = None
) -> jax.Array:
    """tokens [batch, length] int32 -> logits [batch, length, vocab] float32.

    keep: layer index -> bool [length, length] of the pairs that layer may attend to (for ablations).
    """
    keep = keep or {}
    batch, length = tokens.shape
    group = cfg.heads // cfg.kv_heads
    x = params["model.embed_tokens.weight"][tokens]
    for i in range(cfg.layers):
        w = {n: params[f"model.layers.{i}.{n}.weight"] for n in MATRICES}
        h = rms_norm(x, params[f"model.layers.{i}.input_layernorm.weight"], cfg.eps)
        q, k, v = (
            (h @ w[f"self_attn.{n}_proj"]).reshape(batch, length, -1, cfg.head_dim).swapaxes(1, 2) for n in "qkv"
        )
        q = rope(q, cfg.theta).reshape(batch, cfg.kv_heads, group, length, cfg.head_dim)
        a = attend(q, rope(k, cfg.theta), v, keep.get(i))
        a = a.reshape(batch, cfg.heads, length, cfg.head_dim).swapaxes(1, 2).reshape(batch, length, -1)
        x = x + a @ w["self_attn.o_proj"]
        h = rms_norm(x, params[f"model.layers.{i}.post_attention_layernorm.weight"], cfg.eps)
        x = x + (jax.nn.silu(h @ w["mlp.gate_proj"]) * (h @ w["mlp.up_proj"])) @ w["mlp.down_proj"]
    x = rms_norm(x, params["model.norm.weight"], cfg.eps)
    return x @ params["model.embed_tokens.weight"].T
