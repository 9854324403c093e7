"""How much memory there is, and what a step needs besides weights and KV pool."""

import os
from pathlib import Path

from jaxserve.models.config import ModelConfig


def free_host_bytes() -> int:
    """Bytes that can be allocated without swapping; total memory where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def step_bytes(cfg: ModelConfig, num_tokens: int, num_rows: int, itemsize: int, device_kind: str) -> int:
    """Most that one step holds besides weights and pool: sampler state, logits three times over, and one layer's widest
    activations. Generous: compilers need half of it (`tests/executor/test_step_ahead_of_time.py` compares).

    For TPU7x the compiler also lays out the weights of the head anew, for the loop that scores prompts.
    """
    vocabulary = num_rows * cfg.vocab_size
    state, logits = 8 * vocabulary, 3 * 4 * vocabulary
    heads = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_size
    widest = 4 * cfg.embed_size + 2 * max(2 * cfg.ffn_size, 2 * heads)
    head = cfg.vocab_size * cfg.embed_size * itemsize if device_kind == "TPU7x" else 0
    return state + logits + head + num_tokens * widest * itemsize
