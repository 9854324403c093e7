"""The cost model of the devices that an engine runs on: from a file, or else roughly, by their kind."""

import os

from jaxserve.cost import files
from jaxserve.cost.model import CostModel
from jaxserve.cost.roofline import FLOP_SHARE, HOST, of_chip, roofline
from jaxserve.cost.sizes import sizes_of
from jaxserve.models.config import ModelConfig
from jaxserve.pallas_kernels.chips import CHIPS, resembling

# Rough, measured on two cores of an AMD EPYC: of a core, in float32 (twice as many in 16 bits); of all its memory; and what
# XLA's small operations take in every layer, whatever their size.
_CORE_FLOP_PER_S, _CPU_BYTES_PER_S, _CPU_COPY_BYTES_PER_S = 116e9, 20e9, 4e9
_CPU_STEP_S, _CPU_LAYER_S = 0.1e-3, 0.1e-3
_CPU_WAIT_S = 50e-6  # of a collective between devices that are threads
_OTHER = "a100-80gb"  # what a chip that we do not know is taken for


def of_device(
    kind: str,
    platform: str,
    cfg: ModelConfig,
    *,
    choice: str = "auto",
    tensor: int = 1,
    expert: int = 1,
    sequence: int = 1,
    itemsize: int = 2,
    kv_itemsize: int = 2,
    block_size: int = 32,
) -> CostModel:
    """For one replica of a model on a kind of device, as JAX calls it. `choice`: a file of `cost.files`, or "auto".

    Raises:
      ConfigError: the file is none.
    """
    if choice != "auto":
        return files.load(choice)
    if platform != "cpu":
        return of_chip(
            resembling(kind) or CHIPS[_OTHER],
            cfg,
            tensor=tensor,
            expert=expert,
            sequence=sequence,
            itemsize=itemsize,
            kv_itemsize=kv_itemsize,
            block_size=block_size,
        )
    sizes = sizes_of(cfg, tensor=tensor, expert=expert, sequence=sequence)
    num_devices = tensor * expert * sequence
    device = roofline(
        sizes,
        cfg,
        flop_per_s=_CORE_FLOP_PER_S * (os.cpu_count() or 1) * (4 / itemsize) * FLOP_SHARE / num_devices,
        bytes_per_s=_CPU_BYTES_PER_S / num_devices,
        itemsize=itemsize,
        kv_itemsize=kv_itemsize,
        link_bytes_per_s=_CPU_COPY_BYTES_PER_S,
        wait_s=_CPU_WAIT_S,
        launch_s=_CPU_STEP_S + _CPU_LAYER_S * cfg.num_layers,
    )
    return CostModel(
        name=f"CPU x {num_devices}, roughly",
        device=device,
        host=HOST,
        block_bytes=sizes.kv_values * kv_itemsize * block_size,
        swap_bytes_per_s=_CPU_COPY_BYTES_PER_S,
        transfer_bytes_per_s=_CPU_COPY_BYTES_PER_S,
    )
