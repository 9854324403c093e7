"""Model configurations: a Hugging Face `config.json` read once, checked once, and trusted afterwards.

Knows no jax. A feature that changes the numbers and that the models here do not compute is an error that
names the key; keys that do not change the numbers are ignored.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.models.config_experts import Experts, mixtral_experts, qwen2_experts, qwen_experts
from jaxserve.models.config_keys import LIMITS, number, positive_int

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary position embedding. Fields beyond `theta` matter only to the kinds that read them.

    `length` is the longest sequence (tokens) that will be served; only `dynamic` depends on it. Transformers
    recomputes dynamic frequencies from the longest sequence seen so far, which contradicts keys already cached;
    here they are fixed by `length`, so that chunked and whole prefill agree.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    length: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder of the Llama shape. Hashable, so that it can be a static argument of a jitted function."""

    architecture: str
    vocab_size: int
    num_layers: int
    embed_size: int
    ffn_size: int  # of dense layers
    num_heads: int
    num_kv_heads: int
    head_size: int
    norm_eps: float
    rope: Rope
    max_position: int  # tokens; the trained context length
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None
    windows: tuple[int | None, ...] = ()  # per layer: sliding window in tokens (itself included), None = full
    dtype: str = "float32"  # of the checkpoint
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    # To be shared by devices, see `for_shards`:
    kv_repeat: int = 1  # times that each stored KV head occurs among the `num_kv_heads`
    vocab_padding: int = 0  # rows of zeros at the end of the embedding table

    def for_shards(self, weight_shards: int, pool_shards: int, expert_shards: int = 1) -> "ModelConfig":
        """The same model, laid out so that so many devices can share its weights, its KV heads, and its experts: KV heads
        are repeated if they are too few (each copy serves a part of its queries), and the embedding table is padded.

        Raises:
          ConfigError: query heads, feed-forward columns or experts do not divide; the sizes that would are named.
        """
        if self.experts:
            self.experts.check_shards(expert_shards, weight_shards // expert_shards)
        repeated = math.lcm(self.num_kv_heads, pool_shards)
        if self.num_heads % repeated or self._dense_columns % weight_shards:
            raise ConfigError(
                f"{self.num_heads} heads (of {self.num_kv_heads} KV heads) and {self.ffn_size} feed-forward columns cannot "
                f"be shared evenly by {pool_shards} devices",
                remedy=f"Choose tensor * expert * sequence from {', '.join(map(str, self._shard_counts()))}",
            )
        return dataclasses.replace(
            self,
            num_kv_heads=repeated,
            kv_repeat=repeated // self.num_kv_heads,
            vocab_padding=-self.vocab_size % weight_shards,
        )

    def _shard_counts(self) -> list[int]:
        """Numbers of devices that heads and feed-forward columns can be shared by."""
        counts = range(1, self.num_heads + 1)
        return [
            n for n in counts if not self.num_heads % math.lcm(self.num_kv_heads, n) and not self._dense_columns % n
        ]

    @property
    def _dense_columns(self) -> int:
        """`ffn_size`, if any layer is dense; else 0, which any number of devices can share."""
        return 0 if self.experts and all(self.experts.layers) else self.ffn_size

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_values_per_token(self) -> int:
        """Numbers stored in the KV pool for one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Read the config of a Llama, Mistral, Qwen2 or Qwen3 checkpoint, or of one of their relatives with experts.

    Raises:
      CheckpointError: a key is missing, absurd, inconsistent, or asks for a feature that is not implemented.
    """
    architecture = architecture_of(raw)
    traits = _TRAITS[architecture]
    embed_size = positive_int(raw, "hidden_size")
    num_heads = positive_int(raw, "num_attention_heads")
    num_kv_heads = positive_int(raw, "num_key_value_heads", default=num_heads)
    head_size = positive_int(raw, "head_dim", default=max(embed_size // num_heads, 1))
    num_layers = positive_int(raw, "num_hidden_layers")
    max_position = positive_int(raw, "max_position_embeddings", default=2048)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
        )
    if head_size % 2 or head_size < 4:
        raise CheckpointError(f"head_dim={head_size} is odd or below 4; rotary embeddings need an even head size")
    norm_eps = number(raw, "rms_norm_eps", default=1e-6)
    if norm_eps < 0:
        raise CheckpointError(f"config.json: rms_norm_eps={norm_eps} must not be negative")
    _refuse_unimplemented(raw)
    return ModelConfig(
        architecture=architecture,
        vocab_size=positive_int(raw, "vocab_size"),
        num_layers=num_layers,
        embed_size=embed_size,
        ffn_size=positive_int(raw, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        norm_eps=norm_eps,
        rope=_rope(raw, max_position, traits.rope_theta),
        max_position=max_position,
        tie_embeddings=bool(raw.get("tie_word_embeddings", traits.tied)),
        qkv_bias=bool(raw.get(traits.qkv_bias_key, traits.qkv_bias)),
        out_bias=bool(traits.out_bias_key and raw.get("attention_bias", False)),
        mlp_bias=bool(traits.mlp_bias_key and raw.get("mlp_bias", False)),
        qk_norm=traits.qk_norm,
        experts=traits.experts(raw, num_layers) if traits.experts else None,
        windows=traits.windows(raw, num_layers),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        eos_token_ids=token_ids(raw.get("eos_token_id"), "eos_token_id"),
        bos_token_id=next(iter(token_ids(raw.get("bos_token_id"), "bos_token_id")), None),
    )


def architecture_of(raw: Mapping[str, Any]) -> str:
    """The one architecture name in a config that this module can read."""
    names = raw.get("architectures") or [_BY_MODEL_TYPE.get(str(raw.get("model_type")), "")]
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise CheckpointError(f"config.json: architectures must be a list of names, not {names!r}")
    for name in names:
        if name in _TRAITS:
            return name
    asked = ", ".join(n for n in names if n) or repr(raw.get("model_type"))
    raise CheckpointError(
        f"the architecture {asked} is not supported", remedy=f"Supported: {', '.join(sorted(_TRAITS))}"
    )


def token_ids(value: Any, key: str) -> tuple[int, ...]:
    """`None`, one id or a list of ids -> tuple of ids."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    limit = LIMITS["vocab_size"]
    if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < limit for v in values):
        raise CheckpointError(f"{key} must be a token id or a list of token ids, not {value!r:.80}")
    return tuple(values)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Traits:
    """What an architecture name implies beyond the keys of its config."""

    windows: Callable[[Mapping[str, Any], int], tuple[int | None, ...]]
    tied: bool = False
    qkv_bias: bool = False  # where the config says nothing
    qkv_bias_key: str = ""  # the key that says it, if there is one
    out_bias_key: bool = False  # `attention_bias` is read for o
    mlp_bias_key: bool = False
    qk_norm: bool = False
    rope_theta: float = 10_000.0  # where the config names none
    experts: Callable[[Mapping[str, Any], int], Experts] | None = None


def _no_windows(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    del raw
    return (None,) * num_layers


def _mistral_windows(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    return (None if window is None else positive_int(raw, "sliding_window"),) * num_layers


def _qwen_windows(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on are windowed, and only when `use_sliding_window` says so."""
    if not raw.get("use_sliding_window", False) or raw.get("sliding_window") is None:
        return (None,) * num_layers
    window = positive_int(raw, "sliding_window")
    types = raw.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != num_layers:
            raise CheckpointError(f"layer_types must list {num_layers} layers, not {types!r:.80}")
        return tuple(window if t == "sliding_attention" else None for t in types)
    first = int(number(raw, "max_window_layers", default=28))
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _windows_everywhere(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    return _mistral_windows(raw if raw.get("use_sliding_window", False) else {}, num_layers)


def _no_windows_known(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """No published checkpoint has windows, and versions of transformers differ in which layers would have one."""
    if raw.get("use_sliding_window", False):
        raise CheckpointError("use_sliding_window is not implemented for Qwen2-MoE")
    return (None,) * num_layers


_TRAITS: Mapping[str, _Traits] = {
    "LlamaForCausalLM": _Traits(
        windows=_no_windows, qkv_bias_key="attention_bias", out_bias_key=True, mlp_bias_key=True
    ),
    "MistralForCausalLM": _Traits(windows=_mistral_windows),
    "Qwen2ForCausalLM": _Traits(windows=_qwen_windows, qkv_bias=True),
    "Qwen3ForCausalLM": _Traits(windows=_qwen_windows, qkv_bias_key="attention_bias", out_bias_key=True, qk_norm=True),
    "MixtralForCausalLM": _Traits(windows=_mistral_windows, rope_theta=1_000_000.0, experts=mixtral_experts),
    "Qwen2MoeForCausalLM": _Traits(
        windows=_no_windows_known, qkv_bias=True, qkv_bias_key="qkv_bias", experts=qwen2_experts
    ),
    "Qwen3MoeForCausalLM": _Traits(
        windows=_windows_everywhere,
        qkv_bias_key="attention_bias",
        out_bias_key=True,
        qk_norm=True,
        experts=qwen_experts,
    ),
}
_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
ARCHITECTURES: tuple[str, ...] = tuple(sorted(_TRAITS))


def _refuse_unimplemented(raw: Mapping[str, Any]) -> None:
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act={activation!r} is not implemented (only 'silu')")
    if raw.get("quantization_config"):
        how = raw["quantization_config"]
        method = how.get("quant_method", "unknown") if isinstance(how, Mapping) else f"{how!r:.40}"
        raise CheckpointError(
            f"the checkpoint is quantised ({method}), which is not implemented", remedy="Use the unquantised checkpoint"
        )
    for key, neutral in (("partial_rotary_factor", 1.0), ("attn_logit_softcapping", None), ("query_scale", None)):
        if raw.get(key, neutral) not in (neutral, None):
            raise CheckpointError(f"{key}={raw[key]!r} is not implemented")
    types = raw.get("layer_types") or []
    known = ("full_attention", "sliding_attention")
    unknown = [t for t in types if t not in known] if isinstance(types, list) else [types]
    if unknown:
        raise CheckpointError(f"layer_types {sorted(set(map(str, unknown)))!s:.80} are not implemented")


def _rope(raw: Mapping[str, Any], max_position: int, default_theta: float) -> Rope:
    """Both spellings: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5)."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"rope_scaling must be an object, not {scaling!r:.80}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise CheckpointError(f"rope type {kind!r} is not implemented (only {', '.join(ROPE_KINDS)})")
    theta_from = scaling if "rope_theta" in scaling else raw
    optional: dict[str, Any] = {
        key: number(scaling, key)
        for key in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
        if scaling.get(key) is not None
    }
    optional |= {key: number(scaling, key) for key in ("mscale", "mscale_all_dim") if scaling.get(key)}
    rope = Rope(
        kind=kind,
        theta=number(theta_from, "rope_theta", default=default_theta),
        factor=number(scaling, "factor", default=None if kind not in ("default",) else 1.0),
        original_max_position=int(number(scaling, "original_max_position_embeddings", default=max_position)),
        truncate=bool(scaling.get("truncate", True)),
        **optional,
    )
    if min(rope.theta, rope.factor, rope.original_max_position, rope.beta_fast, rope.beta_slow) <= 0:
        raise CheckpointError(f"rope parameters must be positive: {dict(scaling)!s:.200}")
    if rope.theta == 1 or (kind == "llama3" and rope.low_freq_factor == rope.high_freq_factor):
        raise CheckpointError(
            f"rope parameters leave no range of frequencies: theta={rope.theta}, {dict(scaling)!s:.200}"
        )
    return rope
