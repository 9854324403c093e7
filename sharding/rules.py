"""Which axis of an array is split over which axes of the mesh. One table for weights, activations and state."""

from collections.abc import Sequence

from jax.sharding import PartitionSpec

# Logical axis -> mesh axes, the slowest first. What is not named here is never split.
RULES: dict[str, tuple[str, ...]] = {
    # of weights
    "vocab": ("expert", "tensor"),
    "kv_heads": ("expert", "tensor"),
    "heads": ("expert", "tensor"),
    "ffn": ("expert", "tensor"),
    "experts": ("expert",),
    "expert_ffn": ("tensor",),
    # of activations
    "tokens": ("sequence",),
    # of what a replica has for itself: rows of a step, slots, pages
    "replica": ("data",),
    # of the KV pool: every device of a replica holds other heads
    "pool_heads": ("expert", "tensor", "sequence"),
}


def partition(axes: Sequence[str | None]) -> PartitionSpec:
    """The partition of an array, from the logical name of each of its axes.

    Raises: ValueError if two of them would be split over the same mesh axis.
    """
    parts = [RULES.get(axis, ()) if axis else () for axis in axes]
    used = [name for part in parts for name in part]
    twice = sorted({name for name in used if used.count(name) > 1})
    if twice:
        raise ValueError(f"an array with axes {tuple(axes)} would be split twice over the mesh axis {twice[0]!r}")
    return PartitionSpec(*(part or None for part in parts))
