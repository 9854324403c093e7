"""Numbers out of a `config.json`, checked one by one."""

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import CheckpointError

# Far above any published model; a config beyond these is damaged or hostile and must not reach an allocator.
LIMITS = {
    "hidden_size": 65_536,
    "num_hidden_layers": 1_024,
    "num_attention_heads": 1_024,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 22,
    "head_dim": 1_024,
    "max_position_embeddings": 1 << 27,
    "num_experts": 4_096,
    "num_local_experts": 4_096,
    "moe_intermediate_size": 1 << 20,
    "shared_expert_intermediate_size": 1 << 20,
}


def number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number. Raises CheckpointError naming the key."""
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"config.json lacks {key}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) > 1e18:
        raise CheckpointError(f"config.json: {key} must be a finite number, not {value!r:.80}")
    return float(value)


def positive_int(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number from 1 to the key's limit. Raises CheckpointError naming the key."""
    value = number(raw, key, default)
    limit = LIMITS.get(key, 1 << 30)
    if value != int(value) or not 1 <= value <= limit:
        raise CheckpointError(f"config.json: {key}={value:.40g} must be a whole number from 1 to {limit}")
    return int(value)
