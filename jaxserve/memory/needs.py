"""What each device holds while a model is served, in bytes, told from shapes alone.

Weights and pool are exact. What a step needs besides is an upper bound, compared with the compilers' own figures by
`tests/executor/test_step_ahead_of_time.py` and `tests/memory/test_needs.py`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxserve.models import weights
from jaxserve.models.config import ModelConfig
from jaxserve.pallas_kernels.ragged_paged_attention.xla import DECODE_CHUNK, QUERY_TILE, ROWS, TILE_CHUNK
from jaxserve.sampling.logits import mask_words
from jaxserve.sampling.sampler import PROMPT_CHUNK
from jaxserve.sharding.mesh import ONE_DEVICE, Parallel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """Bytes on each device besides the KV pool."""

    weights: int
    sampler: int  # counts, bias and mask of every slot
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
    """Of `sampling.sampler.SamplerState`: a count and a bias for each token of this device's part of the vocabulary, and a
    bit for each token of all of it."""
    return num_slots * (4 + 8 * _vocabulary(cfg, parallel) + 4 * mask_words(cfg.vocab_size + cfg.vocab_padding))


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
    tokens, shards = -(-num_tokens // parallel.num_shards("tokens")), parallel.num_shards("heads")
    heads = (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_size // shards
    # The stream and its norm, both in float32 too, where a layer's sum over devices is made; and the widest products.
    widest = cfg.embed_size * (2 * itemsize + 8) + 2 * max(_inner_size(cfg, parallel), 2 * heads) * itemsize
    head = vocabulary * cfg.embed_size * itemsize if device_kind == "TPU7x" else 0
    prompt = _shared_prompt_bytes(cfg, tokens, itemsize, parallel) if parallel.sequence > 1 else 0
    experts = tokens * _expert_token_bytes(cfg, itemsize, parallel)
    return logits + head + prompt + experts + _tile_bytes(cfg, shards) + tokens * widest


def _inner_size(cfg: ModelConfig, parallel: Parallel) -> int:
    """Numbers between the two products of a feed-forward layer, of each token: gate and up."""
    columns = cfg.experts.shared_ffn_size if cfg.experts and all(cfg.experts.layers) else cfg.ffn_size
    return 2 * columns // parallel.num_shards("ffn")


def _expert_token_bytes(cfg: ModelConfig, itemsize: int, parallel: Parallel) -> int:
    """A token's copies for its experts: what goes in, what is between the products, and what comes out (float32, before and
    after it is put in the tokens' order)."""
    if cfg.experts is None:
        return 0
    inner = 3 * cfg.experts.ffn_size // parallel.num_shards("expert_ffn")
    return cfg.experts.per_token * (cfg.embed_size * (itemsize + 8) + inner * itemsize)


def _tile_bytes(cfg: ModelConfig, shards: int) -> int:
    """Of attention in plain XLA, whose tiles are arrays: scores of prompts, or keys and values of decodes, in float32."""
    scores = 3 * QUERY_TILE * TILE_CHUNK * cfg.num_heads
    read = 2 * ROWS * DECODE_CHUNK * 2 * cfg.num_kv_heads * cfg.head_size
    return 4 * max(scores, read) // shards


def _shared_prompt_bytes(cfg: ModelConfig, tokens: int, itemsize: int, parallel: Parallel) -> int:
    """What comes on top where devices share the attention of a prompt (`sharding.scheme`), with so many tokens on each.
    Keys and values of all tokens, as they arrive and as they are cut into tiles; the angles of all tokens; partial results
    and their merging, in float32."""
    shards, all_tokens = parallel.num_shards("heads"), tokens * parallel.sequence
    arrived = 2 * 2 * cfg.num_kv_heads * cfg.head_size // shards * itemsize
    angles, partial = 2 * 4 * cfg.head_size, 4 * 4 * cfg.num_heads * cfg.head_size // shards
    return all_tokens * (arrived + angles) + tokens * partial


def _vocabulary(cfg: ModelConfig, parallel: Parallel) -> int:
    """Tokens of each device's part of the vocabulary."""
    return (cfg.vocab_size + cfg.vocab_padding) // parallel.num_shards("vocab")
