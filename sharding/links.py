"""How fast the devices of a machine talk with each other, by their kind. From data sheets, not measured."""

import jax

from jaxserve.pallas_kernels.chips import Tpu, resembling
from jaxserve.sharding.scheme import Links

_REACHED = 0.5  # part of a chip's peak that attention is taken to reach


def links_of(kind: str) -> Links:
    """The links of a kind of device (`device_kind`). Unknown kinds, CPUs among them, talk through one memory."""
    chip = resembling(kind)
    if isinstance(chip, Tpu):
        flop_per_s = chip.flop_per_s * _REACHED
        return Links(bytes_per_s=chip.link_bytes_per_s, is_torus=True, start_s=1e-6, flop_per_s=flop_per_s)
    if chip is not None and chip.num_links:
        sent = chip.link_bytes_per_s * chip.num_links
        return Links(bytes_per_s=sent, is_torus=False, start_s=10e-6, flop_per_s=chip.flop_per_s * _REACHED)
    return Links(bytes_per_s=10e9, is_torus=False, start_s=20e-6, flop_per_s=200e9)


def links_here() -> Links:
    """Of the mesh that a program is compiled for ahead of time, or else of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return links_of(device.device_kind if device is not None else jax.devices()[0].device_kind)
