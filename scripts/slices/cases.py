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
)
