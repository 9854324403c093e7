"""What devices tell each other, named by logical axes (`rules.py`).

A step runs under `jax.shard_map`, so that every device sees only its own part of each array, and everything that crosses
devices is written down where it happens. Outside of a mesh, or along axes of size one, these functions do nothing: the
same model code serves one device.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import all_gather, all_to_all, axis_index, ppermute
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Shaped

from jaxserve.sharding.rules import RULES


def mesh_axes(logical: str) -> tuple[str, ...]:
    """The mesh axes that a logical axis is split over, in the program that is being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in RULES[logical] if name in mesh.manual_axes and mesh.shape[name] > 1)


def num_shards(logical: str) -> int:
    """How many devices share a logical axis."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[name] for name in mesh_axes(logical))


def shard_index(logical: str) -> Int[Array, ""]:
    """Which part of a logical axis this device has."""
    axes = mesh_axes(logical)
    return axis_index(axes) if axes else jnp.zeros((), jnp.int32)


def sum_over(logical: str, x: jax.Array) -> jax.Array:
    """The sum of all devices' `x`, on each of them (all-reduce)."""
    axes = mesh_axes(logical)
    return jax.lax.psum(x, axes) if axes else x


def max_over(logical: str, x: jax.Array) -> jax.Array:
    """The largest of all devices' `x`, element by element."""
    axes = mesh_axes(logical)
    return jax.lax.pmax(x, axes) if axes else x


def gather(logical: str, x: jax.Array, axis: int) -> jax.Array:
    """All devices' `x`, one after the other along `axis` (all-gather)."""
    axes = mesh_axes(logical)
    return all_gather(x, axes, axis=axis, tiled=True) if axes else x


def exchange(logical: str, x: jax.Array, *, split: int, join: int) -> jax.Array:
    """Cut `x` along `split`, one part for each device, and join what comes back along `join` (all-to-all)."""
    axes = mesh_axes(logical)
    return all_to_all(x, axes, split_axis=split, concat_axis=join, tiled=True) if axes else x


def part_of(logical: str, x: jax.Array, axis: int = 0) -> jax.Array:
    """This device's part of what all of them have."""
    count = num_shards(logical)
    if count == 1:
        return x
    size = x.shape[axis] // count
    return jax.lax.dynamic_slice_in_dim(x, shard_index(logical) * size, size, axis)


def to_local(logical: str, index: ArrayLike, size: int) -> Int[Array, "..."]:
    """Where an index into the whole axis lies in this device's part of `size`; `size` itself if it lies elsewhere, so that
    scatters with mode="drop" leave it out (a negative index would count from the end)."""
    index = jnp.asarray(index)
    if num_shards(logical) == 1:
        return index
    local = index - shard_index(logical) * size
    return jnp.where((local >= 0) & (local < size), local, size)


def take(logical: str, x: Shaped[Array, "v *rest"], index: ArrayLike) -> Shaped[Array, "..."]:
    """`x[index]` of an array whose first axis is split: each device brings what it has, and all get the sum."""
    size = x.shape[0]
    local = to_local(logical, index, size)
    picked = jnp.take(x, local, axis=0, mode="clip")
    if num_shards(logical) == 1:
        return picked
    is_here = (local < size).reshape(*local.shape, *(1,) * (x.ndim - 1))
    return sum_over(logical, jnp.where(is_here, picked, 0))


def send(logical: str, x: jax.Array, to: Callable[[int], int]) -> jax.Array:
    """Give `x` to device `to(i)` (modulo the devices), i being this one, and get what was sent here (permute).

    `to` must lead to every device once.
    """
    axes, size = mesh_axes(logical), num_shards(logical)
    pairs = [(i, to(i) % size) for i in range(size)]
    return x if all(i == j for i, j in pairs) else ppermute(x, axes, pairs)
