"""Small random checkpoints in Hugging Face format, rebuilt from a seed, so that no weights are stored in git.

`CASES` names one config per feature that a decoder checkpoint may use. The golden tensors of a case were computed
with `transformers` by `scripts/make_reference_tensors.py` and lie in `golden/<case>.npz`:

    prompt_token_ids  i32[n]         about 40 random tokens
    logits            f32[n, vocab]  one full forward pass over the prompt, eager attention, float32
    greedy_token_ids  i32[64]        greedy continuation with a KV cache; no step is nearer to a tie than `min_gap`
    min_gap           f32[]          smallest difference between best and second-best logit along the continuation
    transformers_version, torch_version   strings

Two cases that must mean the same thing (old and new config style) share one golden file: see `golden_path`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

Config = dict[str, Any]

_SIZES: Config = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    # Large enough that an engine which ignores it, or puts it outside the root, fails.
    "rms_norm_eps": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 160,
}

_CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
}


def _config(model_type: str, **changes: Any) -> Config:
    """One config of the standard size; a change to None removes the key."""
    base = {"architectures": [f"{_CLASSES[model_type]}ForCausalLM"], "model_type": model_type, "rope_theta": 10000.0}
    merged = base | _SIZES | changes
    return {key: value for key, value in merged.items() if value is not None}


def new_style(config: Mapping[str, Any]) -> Config:
    """The same model as transformers 5 writes it: `dtype`, and all of RoPE under `rope_parameters`."""
    new = dict(config)
    new["dtype"] = new.pop("torch_dtype")
    scaling = dict(new.pop("rope_scaling", {"rope_type": "default"}))
    scaling.setdefault("rope_type", scaling.pop("type", None))
    new["rope_parameters"] = scaling | {"rope_theta": new.pop("rope_theta")}
    return new


# All three branches of the llama3 rule are hit: wavelengths 6.3 (kept), 19.9 (blended), 62.8 and up (divided).
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
# Against an original length of 1024 neither end of the ramp is clamped, so both betas count.
_YARN_MSCALE = _YARN_ROPE | {
    "original_max_position_embeddings": 1024,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
}
_YARN_FACTOR = _YARN_ROPE | {"attention_factor": 1.3, "truncate": False}

_LLAMA3 = _config("llama", rope_scaling=_LLAMA3_ROPE)
_LLAMA_YARN = _config("llama", rope_scaling=_YARN_ROPE)
_LLAMA_LINEAR = _config("llama", rope_scaling={"type": "linear", "factor": 4.0})
_QWEN2_WINDOW = _config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
_QWEN3 = _config("qwen3", head_dim=32, rope_theta=1000000.0, attention_bias=False)
_MISTRAL_WINDOW = _config("mistral", sliding_window=8, head_dim=16)
_QWEN_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
_QWEN3_MOE = _config("qwen3_moe", head_dim=16, rope_theta=1000000.0, norm_topk_prob=True, **_QWEN_EXPERTS)

# Per case: the config, the seed of its weights, and optionally the case whose golden file it shares.
CASES: dict[str, dict[str, Any]] = {
    "llama2": {"config": _config("llama", num_key_value_heads=4), "seed": 2},
    # Very old configs have neither num_key_value_heads (then: as many as heads) nor rope_theta (then: 10000).
    "llama2_bare": {
        "config": _config("llama", num_key_value_heads=None, rope_theta=None),
        "seed": 2,
        "same_as": "llama2",
    },
    "llama3": {"config": _LLAMA3, "seed": 1},
    "llama3_new_style": {"config": new_style(_LLAMA3), "seed": 1, "same_as": "llama3"},
    "llama_tied": {"config": _config("llama", tie_word_embeddings=True), "seed": 1},
    "llama_linear": {"config": _LLAMA_LINEAR, "seed": 1},
    "llama_linear_new_style": {"config": new_style(_LLAMA_LINEAR), "seed": 1, "same_as": "llama_linear"},
    "llama_yarn": {"config": _LLAMA_YARN, "seed": 1},
    "llama_yarn_new_style": {"config": new_style(_LLAMA_YARN), "seed": 1, "same_as": "llama_yarn"},
    "llama_yarn_mscale": {
        "config": _config("llama", max_position_embeddings=4096, rope_scaling=_YARN_MSCALE),
        "seed": 2,
    },
    "llama_yarn_factor": {"config": _config("llama", rope_scaling=_YARN_FACTOR), "seed": 3},
    # The prompt (40) is longer than 32, so the base is stretched. Cached keys keep the base of their own step.
    "llama_dynamic": {
        "config": _config("llama", max_position_embeddings=32, rope_scaling={"rope_type": "dynamic", "factor": 4.0}),
        "seed": 2,
    },
    "llama_bias": {"config": _config("llama", attention_bias=True, mlp_bias=True), "seed": 2},
    "llama_head_dim": {"config": _config("llama", head_dim=32), "seed": 1},
    # sliding_window is a trap here: use_sliding_window is false, as in every published Qwen2.5 checkpoint.
    "qwen2_tied": {
        "config": _config(
            "qwen2", tie_word_embeddings=True, use_sliding_window=False, sliding_window=8, max_window_layers=1
        ),
        "seed": 1,
    },
    "qwen2": {"config": _config("qwen2", rope_theta=1000000.0), "seed": 1},
    "qwen2_window": {"config": _QWEN2_WINDOW, "seed": 1},
    "qwen2_window_new_style": {
        "config": new_style(_QWEN2_WINDOW)
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        "seed": 1,
        "same_as": "qwen2_window",
    },
    "qwen3": {"config": _QWEN3, "seed": 1},
    "qwen3_new_style": {
        "config": new_style(_QWEN3) | {"layer_types": ["full_attention"] * 3},
        "seed": 1,
        "same_as": "qwen3",
    },
    "qwen3_tied": {"config": _config("qwen3", head_dim=16, tie_word_embeddings=True), "seed": 5},
    "mistral_window": {"config": _MISTRAL_WINDOW, "seed": 1},
    "mistral_window_new_style": {"config": new_style(_MISTRAL_WINDOW), "seed": 1, "same_as": "mistral_window"},
    # A JSON null (not an absent key, whose default is 4096) is how Mistral v0.2 and later say "no window".
    "mistral": {"config": _config("mistral", head_dim=16) | {"sliding_window": None}, "seed": 2},
    # No rope_theta, which then is a million for this family.
    "mixtral": {
        "config": _config("mixtral", num_local_experts=8, num_experts_per_tok=2, rope_theta=None)
        | {"sliding_window": None},
        "seed": 1,
    },
    # Layer 1 is dense; weights of the chosen experts do not sum to one.
    "qwen2_moe": {
        "config": _config(
            "qwen2_moe",
            shared_expert_intermediate_size=40,
            norm_topk_prob=False,
            mlp_only_layers=[1],
            **_QWEN_EXPERTS,
        ),
        "seed": 1,
    },
    "qwen3_moe": {"config": _QWEN3_MOE, "seed": 1},
    # Layer 1 alone has experts, and every token is given to all of them.
    "qwen3_moe_sparse": {
        "config": _QWEN3_MOE | {"decoder_sparse_step": 2, "num_experts": 5, "num_experts_per_tok": 5},
        "seed": 2,
    },
}


def golden_path(case: str) -> Path:
    """Where the golden tensors of `case` lie; cases that mean the same share one file."""
    return GOLDEN / f"{CASES[case].get('same_as', case)}.npz"


def head_dim(config: Mapping[str, Any]) -> int:
    """Width of one attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def has_experts(config: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer of a Qwen checkpoint is a mixture of experts."""
    sparse = (layer + 1) % config.get("decoder_sparse_step", 1) == 0
    return "num_experts" in config and sparse and layer not in config.get("mlp_only_layers", ())


def tensor_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors of the checkpoint, in the order in which they are drawn and stored."""
    family, hidden, ffn = config["model_type"], config["hidden_size"], config["intermediate_size"]
    heads, width = config["num_attention_heads"], head_dim(config)
    kv_heads = config.get("num_key_value_heads") or heads
    attention_bias = bool(config.get("attention_bias"))
    in_bias = family in ("qwen2", "qwen2_moe") or attention_bias  # q, k, v
    out_bias = family != "qwen2" and attention_bias
    mlp_bias = family == "llama" and bool(config.get("mlp_bias"))

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (outputs, inputs)
        if bias:
            yield f"{name}.bias", (outputs,)

    def gated(
        name: str, width: int, parts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"), bias: bool = False
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        gate, up, down = parts
        yield from linear(f"{name}.{gate}", width, hidden, bias)
        yield from linear(f"{name}.{up}", width, hidden, bias)
        yield from linear(f"{name}.{down}", hidden, width, bias)

    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield from linear(f"{prefix}.self_attn.q_proj", heads * width, hidden, in_bias)
        yield from linear(f"{prefix}.self_attn.k_proj", kv_heads * width, hidden, in_bias)
        yield from linear(f"{prefix}.self_attn.v_proj", kv_heads * width, hidden, in_bias)
        yield from linear(f"{prefix}.self_attn.o_proj", hidden, heads * width, out_bias)
        if family in ("qwen3", "qwen3_moe"):
            yield f"{prefix}.self_attn.q_norm.weight", (width,)
            yield f"{prefix}.self_attn.k_norm.weight", (width,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if family == "mixtral":
            yield f"{prefix}.block_sparse_moe.gate.weight", (config["num_local_experts"], hidden)
            for expert in range(config["num_local_experts"]):
                yield from gated(f"{prefix}.block_sparse_moe.experts.{expert}", ffn, ("w1", "w3", "w2"))
        elif has_experts(config, layer):
            yield f"{prefix}.mlp.gate.weight", (config["num_experts"], hidden)
            for expert in range(config["num_experts"]):
                yield from gated(f"{prefix}.mlp.experts.{expert}", config["moe_intermediate_size"])
            if "shared_expert_intermediate_size" in config:
                yield from gated(f"{prefix}.mlp.shared_expert", config["shared_expert_intermediate_size"])
                yield f"{prefix}.mlp.shared_expert_gate.weight", (1, hidden)
        else:
            yield from gated(f"{prefix}.mlp", ffn, bias=mlp_bias)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (config["vocab_size"], hidden)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor, f32, scaled so that logits have a standard deviation of about 3 and every part matters."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1 + np.float32(0.3) * noise
    if name.endswith(".bias"):
        return np.float32(0.2) * noise
    # Queries and keys get a gain so that attention is peaked (and RoPE visible) instead of nearly uniform;
    # the two output projections so that the layers outweigh the embedding in the residual stream.
    gains = {
        "q_proj": 1.5,
        "k_proj": 1.5,
        "o_proj": 2.0,
        "down_proj": 2.0,
        "w2": 2.0,
        "embed_tokens": 3.0,
        "lm_head": 3.0,
    }
    gain = gains.get(name.split(".")[-2], 1.0)
    return noise * np.float32(gain / np.sqrt(shape[-1]))


def make_tensors(config: Mapping[str, Any], seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    """All tensors of the checkpoint by name; the same seed gives the same numbers on every machine."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return {name: _draw(rng, name, shape).astype(DTYPES[dtype]) for name, shape in tensor_shapes(config)}


def write_checkpoint(
    folder: str | Path, config: Mapping[str, Any], seed: int, dtype: str = "float32", shards: int = 1
) -> Path:
    """Writes config.json and the weights in Hugging Face format.

    Args:
        folder: created if needed.
        config: a Hugging Face config of one of the families in `CASES`.
        seed: of the random weights.
        dtype: stored type, "float32", "float16" or "bfloat16"; also written into config.json.
        shards: 1 for `model.safetensors`; more for that many files and `model.safetensors.index.json`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype_key = "dtype" if "dtype" in config else "torch_dtype"
    (folder / "config.json").write_text(json.dumps(dict(config) | {dtype_key: dtype}, indent=2))
    tensors = make_tensors(config, seed, dtype)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for index, names in enumerate(np.array_split(list(tensors), shards), start=1):
        file = f"model-{index:05d}-of-{shards:05d}.safetensors"
        save_file({str(name): tensors[str(name)] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= {str(name): file for name in names}
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    weight_index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_index, indent=2))
    return folder


def write_case(folder: str | Path, case: str, dtype: str = "float32", shards: int = 1) -> Path:
    """Writes the checkpoint of one entry of `CASES`."""
    return write_checkpoint(folder, CASES[case]["config"], CASES[case]["seed"], dtype, shards)
