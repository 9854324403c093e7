"""Write and read the Hugging Face Llama folder of `tiny`."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save
from tokenizers import Tokenizer

from tiny.model import Config
from tiny.tokenizer import BOS, END, PAD, save_tokenizer


def hf_config(cfg: Config) -> dict:
    """config.json of a plain Llama with tied embeddings."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.dim,
        "intermediate_size": cfg.ffn,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_len,
        "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": BOS,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "torch_dtype": "float32",
    }


def export(params: dict[str, jax.Array], cfg: Config, tok: Tokenizer, folder: Path) -> None:
    """Write the whole folder. Matrices are turned from [in, out] to [out, in]."""
    save_tokenizer(tok, folder, cfg.max_len)
    tensors = {k: np.asarray(v, np.float32) for k, v in params.items()}
    tensors = {k: np.ascontiguousarray(v.T) if k.endswith("_proj.weight") else v for k, v in tensors.items()}
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    generation = {
        "bos_token_id": BOS,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "do_sample": False,
    }
    for name, value in (("config.json", hf_config(cfg)), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")


def load(folder: Path) -> tuple[dict[str, jax.Array], Config, Tokenizer]:
    """(params with [in, out] matrices, sizes, tokenizer) of an exported folder."""
    c = json.loads((folder / "config.json").read_text())
    cfg = Config(
        vocab=c["vocab_size"],
        dim=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        ffn=c["intermediate_size"],
        theta=c["rope_theta"],
        eps=c["rms_norm_eps"],
        max_len=c["max_position_embeddings"],
    )
    tensors = load_file(str(folder / "model.safetensors"))
    params = {k: jnp.asarray(v.T if k.endswith("_proj.weight") else v) for k, v in tensors.items()}
    return params, cfg, Tokenizer.from_file(str(folder / "tokenizer.json"))
