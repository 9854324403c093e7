"""What each device holds while a model is served, in bytes, told from shapes alone.

Weights and pool are exact. What a step needs besides is an upper bound, compared with the compilers' own figures by
`tests/executor/test_step_ahead_of_time.py` and `tests/memory/test_needs.py`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxserve.models import weights
from jaxserve.models.config import ModelConfig
from jaxserve.sampling.sampler import PROMPT_CHUNK
from jaxserve.sharding.mesh import ONE_DEVICE, Parallel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes on each device besides the KV pool."""

    weights: int
    sampler: int  # counts and bias of every slot
    activations: int  # the most that a step has beside its arguments

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.sampler + self.activations


def needs_of(
    cfg: ModelConfig,
    specs: Any,
    parallel: Parallel,
    dtype: jnp.dtype,
    *,
    num_tokens: int,
    num_rows: int,
    num_slots: int,
    device_kind: str = "",
) -> Needs:
    """For a replica with `num_slots` slots and steps of up to so many tokens and rows. `cfg` and `specs` are those laid out
    for the mesh."""
    return Needs(
        weights=weights.nbytes(specs, dtype, parallel),
        sampler=sampler_bytes(cfg, num_slots, parallel),
        activations=activation_bytes(cfg, num_tokens, num_rows, dtype.itemsize, parallel, device_kind),
    )


def sampler_bytes(cfg: ModelConfig, num_slots: int, parallel: Parallel = ONE_DEVICE) -> int:
    """Of `sampling.sampler.SamplerState`: a count and a bias for each token of this device's part of the vocabulary."""
    return num_slots * (4 + 8 * _vocabulary(cfg, parallel))


def activation_bytes(
    cfg: ModelConfig,
    num_tokens: int,
    num_rows: int,
    itemsize: int,
    parallel: Parallel = ONE_DEVICE,
    device_kind: str = "",
) -> int:
    """Logits three times over, and one layer's widest activations. Generous: compilers need half of it.

    For TPU7x the compiler also lays out the weights of the head anew, for the loop that scores prompts.
    """
    vocabulary = _vocabulary(cfg, parallel)
    logits = 3 * 4 * max(num_rows, min(PROMPT_CHUNK, num_tokens)) * vocabulary
    tokens = -(-num_tokens // parallel.num_shards("tokens"))
    heads = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_size // parallel.num_shards("heads")
    widest = 4 * cfg.embed_size + 2 * max(2 * cfg.ffn_size // parallel.num_shards("ffn"), 2 * heads)
    head = vocabulary * cfg.embed_size * itemsize if device_kind == "TPU7x" else 0
    return logits + head + tokens * widest * itemsize


def _vocabulary(cfg: ModelConfig, parallel: Parallel) -> int:
    """Tokens of each device's part of the vocabulary."""
    return (cfg.vocab_size + cfg.vocab_padding) // parallel.num_shards("vocab")
