"""The decoder of Llama 2/3, Mistral, Qwen2/2.5 and Qwen3, and of their relatives with experts: Mixtral, Qwen2-MoE and
Qwen3-MoE. What differs between them is a config field.

Weights are fused where the inputs are the same (q, k and v; gate and up), grouped by KV head so that a tensor-parallel
axis can split them without shuffling, and kept `[out, in]`.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxserve.models import mlp, moe
from jaxserve.models.attention import attend
from jaxserve.models.batch import TokenBatch, is_real, last_tokens, positions
from jaxserve.models.config import ModelConfig
from jaxserve.models.kv import KVPages
from jaxserve.models.layers import embed, joined_linear, rms_norm
from jaxserve.models.mlp import Mlp
from jaxserve.models.moe import Moe, Placement
from jaxserve.models.rope import cos_sin
from jaxserve.models.spec import Part, WeightSpec
from jaxserve.pallas_kernels.matmul.op import matmul
from jaxserve.sharding.collectives import num_shards, part_of, shard_index, sum_over

T = TypeVar("T")  # what the tree holds: jax.Array, WeightSpec, a sharding, ...


@struct.dataclass
class Layer(Generic[T]):
    """One decoder layer. In `qkv`, axis j of each KV head holds its `group` query heads, then its key, then its value."""

    attn_norm_e: T
    qkv_kjhe: T
    qkv_bias_kjh: T | None
    q_norm_h: T | None
    k_norm_h: T | None
    out_enh: T
    out_bias_e: T | None
    mlp_norm_e: T
    mlp: Mlp[T] | Moe[T]


@struct.dataclass
class Params(Generic[T]):
    """The whole model. `head_ve` is None when the output matrix is the embedding table."""

    embed_ve: T
    layers: tuple[Layer[T], ...]
    norm_e: T
    head_ve: T | None


class Forward(NamedTuple):
    """What a step's tokens have become."""

    hidden_te: Float[Array, "t e"]  # after the last norm
    kv: KVPages[jax.Array]  # with this step's keys and values
    counts_lx: Int[Array, "l x"] | None  # tokens given to each expert by this replica, padding apart; None: no experts


def forward(
    params: Params[jax.Array],
    cfg: ModelConfig,
    batch: TokenBatch[jax.Array],
    kv: KVPages[jax.Array],
    attention_impl: str | None = None,
    needs_all: Bool[Array, ""] | None = None,
    placement: Placement[jax.Array] | None = None,
) -> Forward:
    """Run one step's tokens through all layers, reading and writing the paged KV pool.

    On a mesh every argument is this device's part (`sharding/rules.py`), the batch that of its replica; the hidden states
    are those of this device's tokens.

    Layers are unrolled: a scan would copy every layer's weights out of a stacked array on CPU.

    Args:
      needs_all: whether every token's hidden state is needed, or only that of each row's last token. In the latter case
        the last layer stops at its keys and values for the other tokens, and their hidden states are zeros. None: all.
      placement: which slots hold each expert's weights; None: slot i those of expert i.
    """
    rotation = _rotation(batch, cfg)
    x_te = embed(part_of("tokens", batch.ids_t), params.embed_ve)
    is_real_t = part_of("tokens", is_real(batch))
    *layers, last = params.layers
    counts: list[jax.Array | None] = []
    for index, layer in enumerate(layers):
        with jax.named_scope(f"layer{index}"):
            heads_tm, kv = attend(layer, cfg, index, x_te, rotation, batch, kv, attention_impl)
            x_te, counts_x = _after_attention(layer, cfg, index, x_te, heads_tm, is_real_t, placement)
            counts.append(counts_x)

    def finish(x_te: jax.Array, heads_tm: jax.Array, is_real_t: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        x_te, counts_x = _after_attention(last, cfg, len(layers), x_te, heads_tm, is_real_t, placement)
        return rms_norm(x_te, params.norm_e, cfg.norm_eps), counts_x

    with jax.named_scope(f"layer{len(layers)}"):
        heads_tm, kv = attend(last, cfg, len(layers), x_te, rotation, batch, kv, attention_impl)
        hidden_te, counts_x = _where_needed(finish, needs_all, batch, x_te, heads_tm, is_real_t)
    return Forward(hidden_te, kv, _stacked([*counts, counts_x], cfg))


def logits(params: Params[jax.Array], cfg: ModelConfig, hidden_se: Float[Array, "s e"]) -> Float[Array, "s v"]:
    """Next-token logits of the chosen hidden states, float32; on a mesh, of this device's part of the vocabulary."""
    with jax.named_scope("head"):
        logits_sv = matmul(hidden_se, params.embed_ve if params.head_ve is None else params.head_ve)
        size = logits_sv.shape[1]
        if size * num_shards("vocab") == cfg.vocab_size:
            return logits_sv
        id_v = shard_index("vocab") * size + jnp.arange(size)
        return jnp.where((id_v < cfg.vocab_size)[None, :], logits_sv, -jnp.inf)


def _stacked(counts: list[jax.Array | None], cfg: ModelConfig) -> Int[Array, "l x"] | None:
    """Every layer's counts, of all devices that share the step's tokens; zeros for dense layers."""
    if cfg.experts is None:
        return None
    none_x = jnp.zeros(cfg.experts.count, jnp.int32)
    return sum_over("tokens", jnp.stack([none_x if counts_x is None else counts_x for counts_x in counts]))


def _where_needed(
    finish: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array | None]],
    needs_all: Bool[Array, ""] | None,
    batch: TokenBatch[jax.Array],
    x_te: Float[Array, "t e"],
    heads_tm: Float[Array, "t m"],
    is_real_t: Bool[Array, " t"],
) -> tuple[Float[Array, "t e"], Int[Array, " x"] | None]:
    """`finish` of all tokens, or of each row's last one only, with zeros for the rest."""
    if needs_all is None or len(batch.kv_len_s) >= len(x_te) or num_shards("tokens") > 1:
        return finish(x_te, heads_tm, is_real_t)

    def of_ends(x_te: jax.Array, heads_tm: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        end_s, has_tokens_s = last_tokens(batch), batch.q_start_s[1:] > batch.q_start_s[:-1]
        hidden_se, counts_x = finish(x_te[end_s], heads_tm[end_s], has_tokens_s)
        # An empty row has no last token: its result must not replace that of the row before.
        return jnp.zeros_like(x_te).at[jnp.where(has_tokens_s, end_s, len(x_te))].set(hidden_se, mode="drop"), counts_x

    return jax.lax.cond(needs_all, finish, of_ends, x_te, heads_tm, is_real_t)


def _after_attention(
    layer: Layer[jax.Array],
    cfg: ModelConfig,
    index: int,
    x_te: Float[Array, "t e"],
    heads_tm: Float[Array, "t m"],
    is_real_t: Bool[Array, " t"],
    placement: Placement[jax.Array] | None,
) -> tuple[Float[Array, "t e"], Int[Array, " x"] | None]:
    """The rest of a layer: output projection, then the MLP or the experts, each added to the residual stream.

    Returns: the residual stream, and the tokens that each expert was given.
    """
    flat_out = layer.out_enh.reshape(cfg.embed_size, heads_tm.shape[1])
    x_te = x_te + joined_linear(heads_tm, flat_out, layer.out_bias_e, over="heads")
    with jax.named_scope("mlp"):
        normed_te = rms_norm(x_te, layer.mlp_norm_e, cfg.norm_eps)
        if isinstance(layer.mlp, Mlp):
            return x_te + mlp.feed_forward(layer.mlp, normed_te), None
        assert cfg.experts is not None
        y_te, counts_x = moe.feed_forward(layer.mlp, cfg.experts, normed_te, is_real_t, placement, index)
        return x_te + y_te, counts_x


def _rotation(batch: TokenBatch[jax.Array], cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every token's angles. Under a condition, because XLA never merges one with what follows: else it
    would compute them anew in every layer, for every head."""

    def compute() -> tuple[jax.Array, jax.Array]:
        return cos_sin(positions(batch), cfg.rope, cfg.head_size)

    def skip() -> tuple[jax.Array, jax.Array]:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))

    return jax.lax.cond(batch.q_start_s[-1] > 0, compute, skip)


def abstract(cfg: ModelConfig) -> Params[WeightSpec]:
    """The parameter tree as specs, with the Hugging Face tensor names each is loaded from."""
    return Params(
        embed_ve=_table(cfg, "model.embed_tokens.weight"),
        layers=tuple(_abstract_layer(cfg, i) for i in range(cfg.num_layers)),
        norm_e=_norm("model.norm.weight", cfg.embed_size, "embed"),
        head_ve=None if cfg.tie_embeddings else _table(cfg, "lm_head.weight"),
    )


def _table(cfg: ModelConfig, name: str) -> WeightSpec:
    """A row for every token, and rows of zeros below them where devices could not share the vocabulary evenly."""
    rows = cfg.vocab_size + cfg.vocab_padding
    stored = Part(name=name, where=(slice(0, cfg.vocab_size),)) if cfg.vocab_padding else Part(name=name)
    return WeightSpec(shape=(rows, cfg.embed_size), axes=("vocab", "embed"), parts=(stored,), fan_in=cfg.embed_size)


def _abstract_layer(cfg: ModelConfig, index: int) -> Layer[WeightSpec]:
    prefix = f"model.layers.{index}."
    e, k, g, h = cfg.embed_size, cfg.num_kv_heads, cfg.group, cfg.head_size
    attn = prefix + "self_attn."
    every = slice(None)

    def qkv(shape: tuple[int, ...], axes: tuple[str, ...], suffix: str) -> WeightSpec:
        parts = (
            Part(name=f"{attn}q_proj.{suffix}", where=(every, slice(0, g))),
            Part(name=f"{attn}k_proj.{suffix}", where=(every, g), repeat=cfg.kv_repeat),
            Part(name=f"{attn}v_proj.{suffix}", where=(every, g + 1), repeat=cfg.kv_repeat),
        )
        return WeightSpec(shape=shape, axes=axes, parts=parts, fan_in=e)

    def plain(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int) -> WeightSpec:
        return WeightSpec(shape=shape, axes=axes, parts=(Part(name=name),), fan_in=fan_in)

    heads, grouped = cfg.num_heads, ("kv_heads", "group", "head")
    return Layer(
        attn_norm_e=_norm(f"{prefix}input_layernorm.weight", e, "embed"),
        qkv_kjhe=qkv((k, g + 2, h, e), (*grouped, "embed"), "weight"),
        qkv_bias_kjh=qkv((k, g + 2, h), grouped, "bias") if cfg.qkv_bias else None,
        q_norm_h=_norm(f"{attn}q_norm.weight", h, "head") if cfg.qk_norm else None,
        k_norm_h=_norm(f"{attn}k_norm.weight", h, "head") if cfg.qk_norm else None,
        out_enh=plain(f"{attn}o_proj.weight", (e, heads, h), ("embed", "heads", "head"), heads * h),
        out_bias_e=plain(f"{attn}o_proj.bias", (e,), ("embed",), e) if cfg.out_bias else None,
        mlp_norm_e=_norm(f"{prefix}post_attention_layernorm.weight", e, "embed"),
        mlp=moe.abstract(cfg, cfg.experts, prefix)
        if cfg.experts and cfg.experts.layers[index]
        else mlp.abstract(f"{prefix}mlp.", e, cfg.ffn_size, has_bias=cfg.mlp_bias),
    )


def _norm(name: str, size: int, axis: str) -> WeightSpec:
    return WeightSpec(shape=(size,), axes=(axis,), parts=(Part(name=name),))
