"""What a program is being traced for."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.chips import GPUS


def target_platform() -> str:
    """ "tpu", "gpu" or "cpu": of the mesh that a program is compiled for ahead of time, or else of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def compute_capability() -> str:
    """Of the GPU that a program is compiled for, as "9.0"; empty if it is for something else."""
    target, here = jax.sharding.get_abstract_mesh().abstract_device, jax.devices()[0]
    if target is None or target.device_kind == here.device_kind:
        return str(getattr(here, "compute_capability", ""))
    return next((gpu.capability for gpu in GPUS.values() if gpu.name == target.device_kind), "")


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """For products that XLA makes: float32 in float32. Unless asked, TPUs multiply it in bfloat16, and NVIDIA's GPUs in TF32
    (10 bits)."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
