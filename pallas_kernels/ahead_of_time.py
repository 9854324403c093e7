"""Compiling for TPUs that are not here: the real compiler runs on any machine with the `libtpu` package.

Source: JAX's ahead-of-time topologies, https://docs.jax.dev/en/latest/aot.html.
"""

import importlib.util
import math
import os
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

# Chip -> the smallest slice the compiler knows by name. One device of it is compiled for.
CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
_HBM_GIB = {"v4": 16, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}  # of a device, which on v4 and
# TPU7x is one of two cores; https://cloud.google.com/tpu/docs


def has_compiler() -> bool:
    """Whether the TPU compiler is installed, or lies where `TPU_LIBRARY_PATH` says."""
    return bool(os.environ.get("TPU_LIBRARY_PATH")) or importlib.util.find_spec("libtpu") is not None


def hbm_bytes(chip: str) -> int:
    """Memory of one device of a chip, all of it."""
    return _HBM_GIB[chip] << 30


def compile_for(chip: str, jitted: Any, *args: Any) -> jax.stages.Compiled:
    """Compile a jitted function for one device of a chip; `args` are arrays or `ShapeDtypeStruct`s.

    Its text, cost and memory can be looked at; it cannot be run.

    Raises:
      ValueError: an unknown chip.
      RuntimeError: the compiler is missing.
    """
    device = _device(chip)
    axis = {"axis_names": ("device",), "axis_types": (AxisType.Auto,)}
    mesh = Mesh([device], **axis)
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    kind = AbstractDevice(platform="tpu", device_kind=device.device_kind, num_cores=device.num_cores or 1)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), **axis, abstract_device=kind)):
        lowered = jitted.lower(*shapes)
    # Kept in the persistent cache it would be found again, but cannot be read without the chip.
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, math.inf)
    try:
        return lowered.compile()
    finally:
        jax.config.update(option, before)


def compiler_version() -> str:
    """Which compiler it is, as it says itself: when it was built, and the number of the change it was built from."""
    return " ".join(_device("v5e").client.platform_version.splitlines()[2:])


def _device(chip: str) -> Any:
    if not has_compiler():
        raise RuntimeError("compiling for TPUs needs the libtpu package: pip install libtpu (Linux, x86-64)")
    if chip not in CHIPS:
        raise ValueError(f"{chip=} is unknown; there are: {', '.join(CHIPS)}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else the library asks the cloud which machine this is
    # No device is opened, so processes do not disturb each other.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]
