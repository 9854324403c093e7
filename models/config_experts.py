"""Mixtures of experts: what a `config.json` says of them, and how devices can share them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.models.config_keys import positive_int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """A mixture of experts in place of some layers' feed-forward part.

    `num_slots` is how many experts' weights are held: more than `count` if some are held twice to share their load. As
    `Rope.length`, it is not of the checkpoint but of how it is served.
    """

    count: int
    per_token: int  # experts that a token is given to
    ffn_size: int  # of one expert
    sums_to_one: bool  # the weights of a token's experts do, else those of all experts
    layers: tuple[bool, ...]  # which layers have experts; the others are dense
    shared_ffn_size: int = 0  # of the expert that every token is given to; 0: there is none
    num_slots: int

    def check_shards(self, expert_shards: int, tensor_shards: int) -> None:
        """Raises: ConfigError if experts, or the columns of one, cannot be shared evenly; the sizes that could are named."""
        for name, size, shards, counts in (
            ("expert_parallel_size", self.num_slots, expert_shards, f"{self.num_slots} experts"),
            ("tensor_parallel_size", self.ffn_size, tensor_shards, f"{self.ffn_size} columns of an expert"),
        ):
            if size % shards:
                valid = [n for n in range(1, size + 1) if not size % n]
                raise ConfigError(
                    f"{counts} cannot be shared evenly by {shards} devices",
                    remedy=f"Choose {name} from {', '.join(map(str, valid))}",
                )
        if self.shared_ffn_size % (expert_shards * tensor_shards):
            raise ConfigError(
                f"{self.shared_ffn_size} columns of the shared expert cannot be shared evenly by "
                f"{expert_shards * tensor_shards} devices",
                remedy=f"Choose expert * tensor so that it divides {self.shared_ffn_size}",
            )


def mixtral_experts(raw: Mapping[str, Any], num_layers: int) -> Experts:
    """Every layer has experts, of `intermediate_size` columns."""
    count = positive_int(raw, "num_local_experts")
    return Experts(
        count=count,
        per_token=_experts_per_token(raw, count),
        ffn_size=positive_int(raw, "intermediate_size"),
        sums_to_one=True,
        layers=(True,) * num_layers,
        num_slots=count,
    )


def qwen_experts(raw: Mapping[str, Any], num_layers: int) -> Experts:
    """Of Qwen3-MoE: some layers may be dense."""
    count = positive_int(raw, "num_experts")
    step = positive_int(raw, "decoder_sparse_step", default=1)
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise CheckpointError(f"mlp_only_layers must be a list of layers, not {dense!r:.80}")
    return Experts(
        count=count,
        per_token=_experts_per_token(raw, count),
        ffn_size=positive_int(raw, "moe_intermediate_size"),
        sums_to_one=bool(raw.get("norm_topk_prob", False)),
        layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)),
        num_slots=count,
    )


def qwen2_experts(raw: Mapping[str, Any], num_layers: int) -> Experts:
    """Of Qwen2-MoE: as `qwen_experts`, and a shared expert."""
    shared = positive_int(raw, "shared_expert_intermediate_size")
    return dataclasses.replace(qwen_experts(raw, num_layers), shared_ffn_size=shared)


def _experts_per_token(raw: Mapping[str, Any], count: int) -> int:
    per_token = positive_int(raw, "num_experts_per_tok")
    if per_token > count:
        raise CheckpointError(f"num_experts_per_tok={per_token} is more than the {count} experts there are")
    return per_token
