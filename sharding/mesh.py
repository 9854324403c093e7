"""The mesh: how many devices do what, and in which order they stand."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jaxserve.errors import ConfigError
from jaxserve.sharding.rules import RULES

AXES = ("data", "sequence", "expert", "tensor")  # slowest links first: neighbours in the last axis talk most


@dataclasses.dataclass(frozen=True, slots=True)
class Parallel:
    """Devices along each axis of the mesh.

    data: replicas of the weights, each with its own rows and its own part of the KV pool.
    sequence: devices that share the tokens of a step; each holds all weights (Ulysses, arXiv 2309.14509).
    expert: devices that share a layer's experts; in layers without experts they share heads, as `tensor` does.
    tensor: devices that share heads, feed-forward columns and vocabulary (Megatron-LM, arXiv 1909.08053).
    """

    data: int = 1
    sequence: int = 1
    expert: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def num_devices(self) -> int:
        """All devices of the mesh."""
        return math.prod(self.sizes)

    def num_shards(self, *logical: str | None) -> int:
        """How many parts an array with these logical axes is split into."""
        return math.prod(getattr(self, axis) for name in logical if name for axis in RULES.get(name, ()))

    def __str__(self) -> str:
        named = [f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return " x ".join(named) or "one device"


ONE_DEVICE = Parallel()


def make_mesh(parallel: Parallel, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all four axes over the first devices that are enough.

    JAX orders them so that the last axes lie on neighbours of a TPU's torus, or within one host of GPUs.

    Raises: ConfigError if there are fewer devices.
    """
    if devices is None and jax.process_count() > 1:
        devices = _of_every_process(parallel)
    devices = list(devices if devices is not None else jax.devices())
    check_count(parallel, len(devices), devices[0].device_kind, devices[0].platform)
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(parallel.sizes, AXES, axis_types=kinds, devices=devices[: parallel.num_devices])


def check_count(parallel: Parallel, num_devices: int, kind: str, platform: str) -> None:
    """Raises: ConfigError if a mesh needs more devices than there are."""
    if parallel.num_devices > num_devices:
        raise ConfigError(
            f"{parallel} needs {parallel.num_devices} devices, but there are {num_devices} ({kind})",
            remedy="Lower the parallel sizes" + _how_to_emulate(platform, parallel.num_devices),
        )


def _of_every_process(parallel: Parallel) -> list[Any]:
    """As many devices of each process, one process after the other: neighbours in the last axes share a host."""
    per_process, rest = divmod(parallel.num_devices, jax.process_count())
    if rest or per_process > jax.local_device_count():
        processes, most = jax.process_count(), jax.device_count()
        raise ConfigError(
            f"{parallel} cannot be spread evenly over {processes} processes with {most // processes} devices each",
            remedy=f"Choose parallel sizes whose product is a multiple of {processes}, and at most {most}",
        )
    return [d for index in range(jax.process_count()) for d in jax.local_devices(process_index=index)[:per_process]]


def _how_to_emulate(platform: str, count: int) -> str:
    if platform != "cpu":
        return ""
    return f", or emulate them with XLA_FLAGS=--xla_force_host_platform_device_count={count}"
