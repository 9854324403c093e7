"""The GPU that Triton kernels are launched on, and jax-triton, which launches them."""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax

from jaxserve.pallas_kernels.platform import target_platform

_INSTALL = "pip install 'jaxserve[gpu,triton]'"


class Chip(NamedTuple):
    """A GPU, as far as a launch depends on it."""

    capability: int  # 75 is Turing, 80 Ampere, 89 Ada, 90 Hopper, 100 Blackwell
    num_cores: int  # streaming multiprocessors


def refusal() -> str:
    """Why nothing can be launched on this machine, or nothing."""
    try:
        jax_triton()
    except (ImportError, AttributeError) as error:  # it uses what is private to JAX, which a new release may not have
        return f"jax-triton cannot be imported; {_INSTALL} ({error})"
    return "" if target_platform() == "gpu" and chip_here() else "only NVIDIA GPUs"


def chip_here() -> Chip | None:
    """The GPU of this machine, if it is one of NVIDIA's."""
    device: Any = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "")).replace(".", "")
    return Chip(int(capability), device.core_count) if capability.isdigit() else None


def jax_triton() -> ModuleType:
    """Imported when it is needed: it is an extra."""
    return importlib.import_module("jax_triton")
