"""How fast the devices of a machine talk with each other, by their kind. From data sheets, not measured."""

import jax

from jaxserve.sharding.scheme import Links

_REACHED = 0.5  # part of a chip's peak that attention is taken to reach

# Kind of device, as JAX calls it -> one way over one link to a neighbour (TPU) or all that a device can send (NVLink), and
# its bfloat16 peak. Sources: cloud.google.com/tpu/docs (bandwidth of all links both ways / number of links / 2), NVIDIA's
# data sheets.
_TPUS = {
    "TPU v4": (50e9, 275e12),
    "TPU v5 lite": (50e9, 197e12),
    "TPU v5": (100e9, 459e12),
    "TPU v6 lite": (100e9, 918e12),
    "TPU7x": (100e9, 1153e12),
}
_GPUS = {"A100": (300e9, 312e12), "H100": (450e9, 989e12), "H200": (450e9, 989e12), "B200": (900e9, 2250e12)}


def links_of(kind: str) -> Links:
    """The links of a kind of device (`device_kind`). Unknown kinds, CPUs among them, talk through one memory."""
    for name, (bytes_per_s, peak) in _TPUS.items():
        if kind == name:
            return Links(bytes_per_s=bytes_per_s, is_torus=True, start_s=1e-6, flop_per_s=peak * _REACHED)
    for name, (bytes_per_s, peak) in _GPUS.items():
        if name in kind:
            return Links(bytes_per_s=bytes_per_s, is_torus=False, start_s=10e-6, flop_per_s=peak * _REACHED)
    return Links(bytes_per_s=10e9, is_torus=False, start_s=20e-6, flop_per_s=200e9)


def links_here() -> Links:
    """Of the mesh that a program is compiled for ahead of time, or else of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return links_of(device.device_kind if device is not None else jax.devices()[0].device_kind)
