"""Random checkpoints in Hugging Face format, made with NumPy only.

    python benchmarks/engine/checkpoint.py FOLDER --dtype bfloat16

The default shape is that of Qwen2.5-0.5B (494 million parameters). Speed does not depend on the values; they are scaled so
that greedy decoding is well defined (logits with a standard deviation of about 3) and engines can be compared token by
token. The same seed gives the same numbers everywhere; bfloat16 is the rounded float32.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}

QWEN25_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
# For trying the benchmark itself: every engine goes through all rows in seconds, and the numbers mean nothing.
TOY = QWEN25_05B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_window_layers": 2,
}
SHAPES = {"qwen25-05b": QWEN25_05B, "toy": TOY}


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen2 checkpoint in the order in which they are drawn."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv_width = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for name, width in (("q", hidden), ("k", kv_width), ("v", kv_width)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (width, hidden)
            yield f"{prefix}.self_attn.{name}_proj.bias", (width,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One random tensor, f32."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        noise *= np.float32(0.1)
        noise += 1
        return noise
    noise *= np.float32(0.2 if name.endswith("bias") else 1 / np.sqrt(shape[-1]))
    if "embed_tokens" in name or "lm_head" in name:
        noise *= np.float32(3)
    # Peaked attention: with nearly uniform attention every prompt ends in one token repeated for ever.
    if "q_proj" in name or "k_proj" in name:
        noise *= np.float32(2)
    return noise


def write_checkpoint(folder: str | Path, config: dict[str, Any], dtype: str, seed: int = 1) -> Path:
    """Writes config.json and model.safetensors, unless the folder already holds exactly this checkpoint."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config | {"torch_dtype": dtype, "random_seed": seed}, indent=2)
    if (folder / "config.json").is_file() and (folder / "config.json").read_text() == text:
        return folder
    rng = np.random.Generator(np.random.PCG64(seed))
    tensors = {name: draw(rng, name, shape).astype(DTYPES[dtype], copy=False) for name, shape in tensor_shapes(config)}
    save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    (folder / "config.json").write_text(text)  # last: its presence says that the weights are complete
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen25-05b")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    print(write_checkpoint(args.folder, SHAPES[args.shape], args.dtype, args.seed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
