"""Configs of published models, for what needs their shapes but not their weights: plans, simulations, random weights.

Each is what its `config.json` on https://huggingface.co says, as far as shapes go. Names that begin with "like-" are
stand-ins by shape only, and say what for. Knows no jax.
"""

from typing import Any

_COMMON = {"tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16"}


def _sized(
    family: dict[str, Any], width: int, layers: int, heads: int, kv_heads: int, ffn: int, **other: Any
) -> dict[str, Any]:
    """A model of a family, by the sizes in which its models differ."""
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
    }
    return _COMMON | family | sizes | other


_LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_MISTRAL = {  # version 0.3, which has no window
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
_MIXTRAL = _MISTRAL | {
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_QWEN_25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}
_QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
}
_QWEN_3_MOE = _QWEN_3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
_YI = _LLAMA_2 | {"vocab_size": 64000, "rope_theta": 5000000.0}
# Four layers of experts as in DeepSeek-V3 (arXiv 2412.19437), its shared one included. Not DeepSeek-V3: grouped-query
# attention of as many heads stands in for its latent attention, and softmax for its routing by sigmoid.
_LIKE_DEEPSEEK_V3 = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "shared_expert_intermediate_size": 2048,
    "norm_topk_prob": True,
    "qkv_bias": False,
    "vocab_size": 129280,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
}
# OPT's layers (arXiv 2205.01068) are no Llama layers: here its two products of 20,480 columns are three of two thirds as
# many, so that a token costs the same; heads, layers and context are OPT's.
_LIKE_OPT = _LLAMA_2 | {"vocab_size": 50272, "max_position_embeddings": 2048}

MODELS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _sized(_LLAMA_2, 4096, 32, 32, 32, 11008),
    "llama-2-13b": _sized(_LLAMA_2, 5120, 40, 40, 40, 13824),
    "llama-2-70b": _sized(_LLAMA_2, 8192, 80, 64, 8, 28672),
    "llama-3.1-8b": _sized(_LLAMA_3, 4096, 32, 32, 8, 14336),
    "llama-3.3-70b": _sized(_LLAMA_3, 8192, 80, 64, 8, 28672),
    "mistral-7b": _sized(_MISTRAL, 4096, 32, 32, 8, 14336),
    "mixtral-8x7b": _sized(_MIXTRAL, 4096, 32, 32, 8, 14336),
    "qwen2.5-32b": _sized(_QWEN_25, 5120, 64, 40, 8, 27648),
    "qwen3-0.6b": _sized(_QWEN_3, 1024, 28, 16, 8, 3072, tie_word_embeddings=True),
    "qwen3-1.7b": _sized(_QWEN_3, 2048, 28, 16, 8, 6144, tie_word_embeddings=True),
    "qwen3-4b": _sized(_QWEN_3, 2560, 36, 32, 8, 9728, tie_word_embeddings=True),
    "qwen3-8b": _sized(_QWEN_3, 4096, 36, 32, 8, 12288),
    "qwen3-14b": _sized(_QWEN_3, 5120, 40, 40, 8, 17408),
    "qwen3-32b": _sized(_QWEN_3, 5120, 64, 64, 8, 25600),
    "qwen3-30b-a3b": _sized(_QWEN_3_MOE, 2048, 48, 32, 4, 6144),
    "yi-34b": _sized(_YI, 7168, 60, 56, 8, 20480),
    "like-deepseek-v3": _sized(_LIKE_DEEPSEEK_V3, 7168, 4, 128, 8, 18432),
    "like-opt-13b": _sized(_LIKE_OPT, 5120, 40, 40, 40, 13648),
}
