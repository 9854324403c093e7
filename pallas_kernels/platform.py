"""What a program is being traced for."""

import jax


def target_platform() -> str:
    """ "tpu", "gpu" or "cpu": of the mesh that a program is compiled for ahead of time, or else of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform
