"""Rotary position embeddings: frequencies per scaling kind, and the rotation itself.

Sources: RoPE, arXiv 2104.09864; YaRN, arXiv 2309.00071 (also for `dynamic` NTK); Llama 3.1's frequency bands as in
the release's own code. Half-rotation layout (first half of the head against the second), as Hugging Face stores it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxserve.models.config import Rope


def inverse_frequencies(rope: Rope, head_size: int) -> tuple[np.ndarray, float]:
    """Frequencies (radians per token), float64[head_size / 2], and the factor that scales cos and sin."""
    exponent = np.arange(0, head_size, 2, dtype=np.float64) / head_size
    plain = rope.theta**-exponent
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "dynamic":
        return _dynamic(rope, head_size), 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_size)
    return plain, 1.0


def rotate(
    x_tnh: Float[Array, "t n h"], cos_th: Float[Array, "t half"], sin_th: Float[Array, "t half"]
) -> Float[Array, "t n h"]:
    """Rotate every head of every token by its position; computed in float32, returned in the input's dtype."""
    first, second = jnp.split(x_tnh.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_th[:, None, :], sin_th[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_tnh.dtype)


def cos_sin(pos_t: Int[Array, " t"], rope: Rope, head_size: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every token's angles, float32[t, head_size / 2] each; computed once per step for all layers."""
    frequencies, scale = inverse_frequencies(rope, head_size)
    angle = pos_t.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None, :]
    return jnp.cos(angle) * jnp.float32(scale), jnp.sin(angle) * jnp.float32(scale)


def _dynamic(rope: Rope, head_size: int) -> np.ndarray:
    """NTK-aware base, raised so that `length` tokens span what the trained window spanned."""
    trained = rope.original_max_position
    length = max(rope.length, trained)
    stretch = rope.factor * length / trained - (rope.factor - 1)
    theta = rope.theta * stretch ** (head_size / (head_size - 2))
    return theta ** -(np.arange(0, head_size, 2, dtype=np.float64) / head_size)


def _llama3(rope: Rope, plain: np.ndarray) -> np.ndarray:
    """Long waves are slowed by `factor`, short ones kept, those between blended."""
    turns = rope.original_max_position * plain / (2 * math.pi)  # rotations within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: Rope, plain: np.ndarray, head_size: int) -> tuple[np.ndarray, float]:
    def dimension_of(turns: float) -> float:
        ratio = rope.original_max_position / (turns * 2 * math.pi)
        return head_size * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    ramp = np.clip((np.arange(head_size // 2) - low) / (max(high - low, 0.001)), 0.0, 1.0)
    return plain / rope.factor * ramp + plain * (1 - ramp), _yarn_scale(rope)


def _yarn_scale(rope: Rope) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)
