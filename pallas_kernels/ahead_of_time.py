"""Compiling for chips that are not here: the real compilers run on any machine (Linux, x86-64), for TPUs with the `libtpu`
package, for NVIDIA GPUs with `jax[cuda13]`.

Source: JAX's ahead-of-time topologies, https://docs.jax.dev/en/latest/aot.html.
"""

import contextlib
import importlib.util
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxserve.pallas_kernels.chips import CHIPS, GPUS, TPUS, Gpu


def has_compiler() -> bool:
    """Whether the TPU compiler is installed, or lies where `TPU_LIBRARY_PATH` says."""
    return bool(os.environ.get("TPU_LIBRARY_PATH")) or importlib.util.find_spec("libtpu") is not None


def has_gpu_compiler() -> bool:
    """Whether XLA for NVIDIA GPUs is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None for version in (12, 13))


def compiler_version() -> str:
    """Which TPU compiler it is, as it says itself: when it was built, and the number of the change it was built from."""
    return " ".join(_tpu("v5e")[0].client.platform_version.splitlines()[2:])


def compile_for(chip: str, jitted: Any, *args: Any) -> jax.stages.Compiled:
    """Compile a jitted function for one device of a chip; `args` are arrays or `ShapeDtypeStruct`s.

    Its text, cost and memory can be looked at; it cannot be run.

    Raises:
      ValueError: an unknown chip.
      RuntimeError: the compiler is missing.
    """
    device, kind = _gpu(chip) if chip in GPUS else _tpu(chip)
    axis = {"axis_names": ("device",), "axis_types": (AxisType.Auto,)}
    sharding = NamedSharding(Mesh([device], **axis), PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), **axis, abstract_device=kind)):
        lowered = jitted.lower(*shapes)
    with _unkept():
        return lowered.compile()


class Program(NamedTuple):
    """A compiled function; its cost and memory can be looked at, the latter for each device. It cannot be run."""

    compiled: jax.stages.Compiled
    text: str  # `compiled.as_text()` fails where copies that run beside have several operands


def slice_devices(topology: str) -> list[Any]:
    """The devices of a TPU slice, for a mesh that `compile_on` compiles for.

    A slice is told here by its chips along the axes of its torus: "v5e:2x4", "v5p:2x2x4". In Google's names v5e and v6e
    slices count chips (v6e-8 is v6e:2x4), v5p slices count cores, and a chip has two: v5p-8 is v5p:2x2x1, 4 chips, and
    v5p-32 is v5p:2x2x4, 16 chips. Both cores of a v5p chip are one device, those of a v4 or TPU7x chip are two here.
    Source: https://cloud.google.com/tpu/docs/v5p

    Raises:
      ValueError: an unknown chip, or no such slice of it.
      RuntimeError: the compiler is missing.
    """
    if topology.split(":")[0] not in TPUS:
        raise ValueError(f"{topology=} is of no known chip; there are: {', '.join(TPUS)}")
    return _topology(topology)


def compile_on(mesh: Mesh, jitted: Any, *args: Any) -> Program:
    """Compile a jitted function for all devices of a mesh of `slice_devices`.

    `args` are `ShapeDtypeStruct`s that say how they lie on the mesh; what does not say is the same on all devices.
    """
    same = NamedSharding(mesh, PartitionSpec())

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        lies = getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies if isinstance(lies, NamedSharding) else same)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jitted.lower(*jax.tree.map(placed, args))
    with _unkept(), tempfile.TemporaryDirectory() as folder:
        wanted = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": "^jit_"}
        compiled = lowered.compile(compiler_options=wanted)
        (file,) = Path(folder).glob("*after_optimizations.txt")
        return Program(compiled, file.read_text())


def _tpu(chip: str) -> tuple[Any, AbstractDevice]:
    if chip not in TPUS:
        raise ValueError(f"{chip=} is unknown; there are: {', '.join(CHIPS)}")
    device = _topology(TPUS[chip].topology)[0]
    return device, AbstractDevice(platform="tpu", device_kind=device.device_kind, num_cores=device.num_cores or 1)


def _topology(name: str) -> list[Any]:
    if not has_compiler():
        raise RuntimeError("compiling for TPUs needs the libtpu package: pip install libtpu (Linux, x86-64)")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else the library asks the cloud which machine this is
    # No device is opened, so processes do not disturb each other.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"the compiler knows no slice {name!r}: {error}") from None


def _gpu(chip: str) -> tuple[Any, AbstractDevice]:
    if not has_gpu_compiler():
        raise RuntimeError("compiling for NVIDIA GPUs needs pip install 'jax[cuda13]' (4 GB; Linux, x86-64)")
    device = topologies.get_topology_desc(
        platform="cuda", topology_name=chip, target_config=_target_config(GPUS[chip]), topology="1x1x1"
    ).devices[0]
    kind = AbstractDevice(platform=device.platform, device_kind=device.device_kind, num_cores=GPUS[chip].num_cores)
    return device, kind


def _target_config(gpu: Gpu) -> str:
    """As a text proto of XLA's GpuTargetConfig."""
    major, minor = gpu.capability.split(".")
    return f"""
        platform_name: "CUDA" device_description_str: "{gpu.name}"
        dnn_version_info {{ major: 9 minor: 10 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {gpu.num_cores} fpus_per_core: {gpu.fpus_per_core} clock_rate_ghz: {gpu.clock_ghz}
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {gpu.threads_per_core}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_core: {gpu.smem_bytes} shared_memory_per_block: 49152
          shared_memory_per_block_optin: {gpu.smem_bytes - 1024}
          memory_bandwidth: {gpu.hbm_bytes_per_s} device_memory_size: {gpu.hbm_bytes} l2_cache_size: {gpu.l2_bytes}
        }}"""


@contextlib.contextmanager
def _unkept() -> Iterator[None]:
    """Nothing goes into the persistent cache, where it would be found again but could not be read without the chip."""
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, math.inf)
    try:
        yield
    finally:
        jax.config.update(option, before)
