"""Attention from the formula, in float64 NumPy, and prompts to try it on. Shares nothing with what it checks."""

import numpy as np


def dense(q_tnh, k_tkh, v_tkh, length: int, *, scale: float, causal: bool = True, window: int | None = None):
    """float64[t n h]; rows past the length are zeros."""
    num_heads = q_tnh.shape[1]
    group = num_heads // k_tkh.shape[1]
    out_tnh = np.zeros(q_tnh.shape)
    for query in range(length):
        first = 0 if window is None else max(0, query - window + 1)
        keys = slice(first, query + 1 if causal else length)
        for head in range(num_heads):
            scores = k_tkh[keys, head // group].astype(np.float64) @ q_tnh[query, head].astype(np.float64) * scale
            weights = np.exp(scores - scores.max())
            out_tnh[query, head] = weights @ v_tkh[keys, head // group] / weights.sum()
    return out_tnh


def prompt(num_tokens: int, num_heads: int, num_kv_heads: int, head_size: int, seed: int = 0):
    """Random float32 queries, keys and values."""
    rng = np.random.default_rng(seed)
    shapes = [(num_tokens, heads, head_size) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
