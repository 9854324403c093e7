"""What a model's tokens cost, from its config alone: weights, products, keys and values. Per device, if devices share it."""

import dataclasses

from jaxserve.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Counts for one device of those that share a replica. A multiplication with its addition is two operations.

    Softmax, norms and rotations are left out: a few operations per number, where products have thousands.
    """

    params: int  # numbers held
    expert_params: int  # of these in experts that only some tokens are given to
    read_params: (
        int  # numbers that every step reads: all but experts and, if it is not the head too, the embedding table
    )
    token_flop: float  # of a replica's token: products with weights, experts and head apart
    expert_flop: float  # of a replica's token with its experts
    row_flop: float  # of a row's logits
    pair_flop: float  # of a query and a key, over all layers
    kv_values: int  # numbers that a token's keys and values take
    token_values: float  # numbers that a token's products read and write beside weights
    row_values: float  # logits of a row
    sent_values: float  # numbers of a token that a device sends to others (all-reduce by rings, all-to-all)
    num_collectives: int  # of a step


def sizes_of(cfg: ModelConfig, *, tensor: int = 1, expert: int = 1, sequence: int = 1) -> Sizes:
    """Of a model that so many devices share, along the axes of `sharding.mesh.Parallel`.

    Raises:
      ConfigError: they cannot.
    """
    shards = tensor * expert
    cfg = cfg.for_shards(shards, shards * sequence, expert)
    layers = [
        _layer(cfg, bool(cfg.experts and cfg.experts.layers[i]), shards, tensor, expert) for i in range(cfg.num_layers)
    ]
    table = (cfg.vocab_size + cfg.vocab_padding) // shards * cfg.embed_size
    whole, experts, products, routed, values = (sum(column) for column in zip(*layers, strict=True))
    heads = cfg.num_heads * cfg.head_size
    kv_heads = cfg.num_kv_heads * cfg.head_size
    ring = 2 * (shards - 1) / shards
    num_sums = 2 * cfg.num_layers + 1 if shards > 1 else 0
    swapped = (sequence - 1) / sequence * cfg.num_layers * 2 * (heads + kv_heads) / shards
    return Sizes(
        params=whole + experts + table * (1 if cfg.tie_embeddings else 2) + cfg.embed_size,
        expert_params=experts,
        read_params=whole + table + cfg.embed_size,
        token_flop=2 * products / sequence,
        expert_flop=2 * routed / sequence,
        row_flop=2 * table,
        pair_flop=4 * cfg.num_layers * heads / (shards * sequence),
        kv_values=2 * cfg.num_layers * kv_heads // (shards * sequence),
        token_values=values / sequence,
        row_values=table // cfg.embed_size,
        sent_values=(num_sums * cfg.embed_size * ring + swapped) / sequence,
        num_collectives=num_sums + (2 * cfg.num_layers if sequence > 1 else 0),
    )


def _layer(
    cfg: ModelConfig, has_experts: bool, shards: int, tensor: int, expert: int
) -> tuple[int, int, int, float, float]:
    """Numbers held beside experts, and in experts; multiplications of a token beside its experts, and with them; numbers
    that its products read and write."""
    e, heads, kv_heads = cfg.embed_size, cfg.num_heads * cfg.head_size, cfg.num_kv_heads * cfg.head_size
    qkv = heads + 2 * kv_heads
    products = (e * qkv + heads * e) // shards
    biases = (qkv // shards if cfg.qkv_bias else 0) + (e if cfg.out_bias else 0)
    norms = 2 * e + (2 * cfg.head_size if cfg.qk_norm else 0)
    values = 2 * e + (qkv + heads) / shards
    if not (has_experts and cfg.experts):
        dense = 3 * e * cfg.ffn_size // shards
        biases += (2 * cfg.ffn_size // shards + e) if cfg.mlp_bias else 0
        return products + dense + biases + norms, 0, products + dense, 0.0, values + 2 * e + 3 * cfg.ffn_size / shards
    x = cfg.experts
    shared = 3 * e * x.shared_ffn_size // shards + (e if x.shared_ffn_size else 0)
    router = x.count * e
    held = x.num_slots // expert * 3 * e * (x.ffn_size // tensor)
    routed = x.per_token * 3 * e * x.ffn_size / shards
    values += x.per_token * (2 * e / expert + 3 * x.ffn_size / shards) + 2 * e + 3 * x.shared_ffn_size / shards
    return products + router + shared + biases + norms, held, products + router + shared, routed, values
