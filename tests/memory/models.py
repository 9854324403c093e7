"""Published shapes to plan for."""

from tests.executor.test_step_ahead_of_time import MODELS

LLAMA_8B = MODELS["llama-3.1-8b"] | {"torch_dtype": "bfloat16"}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}
