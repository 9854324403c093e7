"""Weights declared before they exist. Random init, loading, sharding and size estimates derive from one spec tree."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A checkpoint tensor and the region of our array that it fills (`where` indexes leading axes; () = all).

    `repeat`: each entry along the region's first axis is stored once and occurs so many times, one after the other.
    """

    name: str
    where: tuple[slice | int, ...] = ()
    repeat: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WeightSpec:
    """One parameter: its shape, the logical name of each axis, and the checkpoint tensors it is made of.

    A part is reshaped to the region it fills, so fused arrays need no transposition when they are loaded.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    parts: tuple[Part, ...]
    fan_in: int = 0  # 0: initialised to one (a norm's weight); else normal with deviation fan_in ** -0.5

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def region_shape(self, part: Part) -> tuple[int, ...]:
        """The shape of what a part fills."""
        # Zero strides: an index is answered without allocating the array.
        return np.broadcast_to(np.zeros((), np.int8), self.shape)[part.where].shape

    def stored_shape(self, part: Part) -> tuple[int, ...]:
        """The shape a part has in a Hugging Face checkpoint: a vector, or a matrix [out, in]."""
        size = math.prod(self.region_shape(part)) // part.repeat
        is_vector = not self.fan_in or part.name.endswith(".bias")
        return (size,) if is_vector else (size // self.fan_in, self.fan_in)


def leaves(specs: Any) -> list[WeightSpec]:
    """All specs of a tree, in its order."""
    return jax.tree.leaves(specs, is_leaf=is_spec)


def is_spec(node: Any) -> bool:
    """For `jax.tree.map(..., is_leaf=is_spec)`."""
    return isinstance(node, WeightSpec)
