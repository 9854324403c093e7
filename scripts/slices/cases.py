"""Which models are compiled for which slices."""

import dataclasses
from typing import Any

from jaxserve.sharding.mesh import Parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a slice. `config` is what its config.json says."""

    slice: str  # Google's name
    topology: str  # chips along the axes of the torus, see `ahead_of_time.slice_devices`
    model: str
    config: dict[str, Any]
    parallel: Parallel


_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
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
    "torch_dtype": "bfloat16",
}
LLAMA_8B = _LLAMA | {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 14336,
}
LLAMA_70B = _LLAMA | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}
_QWEN_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}
_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
# Four layers of experts as in DeepSeek-V3 (arXiv 2412.19437), its shared one included. Not DeepSeek-V3: grouped-query
# attention of as many heads stands in for its latent attention, and softmax for its routing by sigmoid.
_LIKE_DEEPSEEK_V3 = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "hidden_size": 7168,
    "num_hidden_layers": 4,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 18432,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "shared_expert_intermediate_size": 2048,
    "norm_topk_prob": True,
    "qkv_bias": False,
    "vocab_size": 129280,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
    "torch_dtype": "bfloat16",
}

CASES = (
    Case(
        slice="v5e-4",
        topology="v5e:2x2",
        model="llama-3.1-8b",
        config=LLAMA_8B,
        parallel=Parallel(tensor=4),
    ),
    Case(
        slice="v6e-8",
        topology="v6e:2x4",
        model="llama-3.3-70b",
        config=LLAMA_70B,
        parallel=Parallel(tensor=8),
    ),
    Case(
        slice="v5p-8",
        topology="v5p:2x2x1",
        model="llama-3.3-70b",
        config=LLAMA_70B,
        parallel=Parallel(tensor=4),
    ),
    Case(
        slice="v6e-4",
        topology="v6e:2x2",
        model="qwen3-30b-a3b",
        config=_QWEN_30B,
        parallel=Parallel(expert=4),
    ),
    Case(
        slice="v5e-8",
        topology="v5e:2x4",
        model="mixtral-8x7b",
        config=_MIXTRAL,
        parallel=Parallel(expert=4, tensor=2),
    ),
    Case(
        slice="v5p-32",
        topology="v5p:2x2x4",
        model="like-deepseek-v3",
        config=_LIKE_DEEPSEEK_V3,
        parallel=Parallel(expert=16),
    ),
)
