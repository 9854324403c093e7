"""Model configurations: a Hugging Face `config.json` read once, checked once, and trusted afterwards.

Knows no jax. A feature that changes the numbers and that the models here do not compute is an error that
names the key; keys that do not change the numbers are ignored.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.errors import CheckpointError

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")

# Far above any published model; a config beyond these is damaged or hostile and must not reach an allocator.
_LIMITS = {
    "hidden_size": 65_536,
    "num_hidden_layers": 1_024,
    "num_attention_heads": 1_024,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 22,
    "head_dim": 1_024,
    "max_position_embeddings": 1 << 27,
    "num_experts": 4_096,
    "num_local_experts": 4_096,
    "moe_intermediate_size": 1 << 20,
    "shared_expert_intermediate_size": 1 << 20,
}


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
class Experts:
    """A mixture of experts in place of some layers' feed-forward part.

    `num_slots` is how many experts' weights are held: more than `count` if some are held twice to share their load. As
    `Rope.length`, it is not of the checkpoint but of how it is served.
    """

    count: int
    per_token: int  # experts that a token is given to
    ffn_size: int  # of one expert
    sums_to_one: bool  # the weights of a token's experts do, else those of all experts
    layers: tuple[bool, ...]  # which layers have experts; the others are dense
    shared_ffn_size: int = 0  # of the expert that every token is given to; 0: there is none
    num_slots: int


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
    embed_size = _positive_int(raw, "hidden_size")
    num_heads = _positive_int(raw, "num_attention_heads")
    num_kv_heads = _positive_int(raw, "num_key_value_heads", default=num_heads)
    head_size = _positive_int(raw, "head_dim", default=max(embed_size // num_heads, 1))
    num_layers = _positive_int(raw, "num_hidden_layers")
    max_position = _positive_int(raw, "max_position_embeddings", default=2048)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
        )
    if head_size % 2 or head_size < 4:
        raise CheckpointError(f"head_dim={head_size} is odd or below 4; rotary embeddings need an even head size")
    norm_eps = _number(raw, "rms_norm_eps", default=1e-6)
    if norm_eps < 0:
        raise CheckpointError(f"config.json: rms_norm_eps={norm_eps} must not be negative")
    _refuse_unimplemented(raw)
    return ModelConfig(
        architecture=architecture,
        vocab_size=_positive_int(raw, "vocab_size"),
        num_layers=num_layers,
        embed_size=embed_size,
        ffn_size=_positive_int(raw, "intermediate_size"),
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
    limit = _LIMITS["vocab_size"]
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
    return (None if window is None else _positive_int(raw, "sliding_window"),) * num_layers


def _qwen_windows(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Layers from `max_window_layers` on are windowed, and only when `use_sliding_window` says so."""
    if not raw.get("use_sliding_window", False) or raw.get("sliding_window") is None:
        return (None,) * num_layers
    window = _positive_int(raw, "sliding_window")
    types = raw.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != num_layers:
            raise CheckpointError(f"layer_types must list {num_layers} layers, not {types!r:.80}")
        return tuple(window if t == "sliding_attention" else None for t in types)
    first = int(_number(raw, "max_window_layers", default=28))
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _windows_everywhere(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    return _mistral_windows(raw if raw.get("use_sliding_window", False) else {}, num_layers)


def _no_windows_known(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """No published checkpoint has windows, and versions of transformers differ in which layers would have one."""
    if raw.get("use_sliding_window", False):
        raise CheckpointError("use_sliding_window is not implemented for Qwen2-MoE")
    return (None,) * num_layers


def _mixtral_experts(raw: Mapping[str, Any], num_layers: int) -> Experts:
    count = _positive_int(raw, "num_local_experts")
    return Experts(
        count=count,
        per_token=_experts_per_token(raw, count),
        ffn_size=_positive_int(raw, "intermediate_size"),
        sums_to_one=True,
        layers=(True,) * num_layers,
        num_slots=count,
    )


def _qwen_experts(raw: Mapping[str, Any], num_layers: int) -> Experts:
    count = _positive_int(raw, "num_experts")
    step = _positive_int(raw, "decoder_sparse_step", default=1)
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise CheckpointError(f"mlp_only_layers must be a list of layers, not {dense!r:.80}")
    return Experts(
        count=count,
        per_token=_experts_per_token(raw, count),
        ffn_size=_positive_int(raw, "moe_intermediate_size"),
        sums_to_one=bool(raw.get("norm_topk_prob", False)),
        layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)),
        num_slots=count,
    )


def _qwen2_experts(raw: Mapping[str, Any], num_layers: int) -> Experts:
    shared = _positive_int(raw, "shared_expert_intermediate_size")
    return dataclasses.replace(_qwen_experts(raw, num_layers), shared_ffn_size=shared)


def _experts_per_token(raw: Mapping[str, Any], count: int) -> int:
    per_token = _positive_int(raw, "num_experts_per_tok")
    if per_token > count:
        raise CheckpointError(f"num_experts_per_tok={per_token} is more than the {count} experts there are")
    return per_token


_TRAITS: Mapping[str, _Traits] = {
    "LlamaForCausalLM": _Traits(
        windows=_no_windows, qkv_bias_key="attention_bias", out_bias_key=True, mlp_bias_key=True
    ),
    "MistralForCausalLM": _Traits(windows=_mistral_windows),
    "Qwen2ForCausalLM": _Traits(windows=_qwen_windows, qkv_bias=True),
    "Qwen3ForCausalLM": _Traits(windows=_qwen_windows, qkv_bias_key="attention_bias", out_bias_key=True, qk_norm=True),
    "MixtralForCausalLM": _Traits(windows=_mistral_windows, rope_theta=1_000_000.0, experts=_mixtral_experts),
    "Qwen2MoeForCausalLM": _Traits(
        windows=_no_windows_known, qkv_bias=True, qkv_bias_key="qkv_bias", experts=_qwen2_experts
    ),
    "Qwen3MoeForCausalLM": _Traits(
        windows=_windows_everywhere,
        qkv_bias_key="attention_bias",
        out_bias_key=True,
        qk_norm=True,
        experts=_qwen_experts,
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
        key: _number(scaling, key)
        for key in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
        if scaling.get(key) is not None
    }
    optional |= {key: _number(scaling, key) for key in ("mscale", "mscale_all_dim") if scaling.get(key)}
    rope = Rope(
        kind=kind,
        theta=_number(theta_from, "rope_theta", default=default_theta),
        factor=_number(scaling, "factor", default=None if kind not in ("default",) else 1.0),
        original_max_position=int(_number(scaling, "original_max_position_embeddings", default=max_position)),
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


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"config.json lacks {key}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) > 1e18:
        raise CheckpointError(f"config.json: {key} must be a finite number, not {value!r:.80}")
    return float(value)


def _positive_int(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _number(raw, key, default)
    limit = _LIMITS.get(key, 1 << 30)
    if value != int(value) or not 1 <= value <= limit:
        raise CheckpointError(f"config.json: {key}={value:.40g} must be a whole number from 1 to {limit}")
    return int(value)
