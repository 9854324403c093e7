"""Chip x model x devices -> cost model, from data sheets. What nobody measured is an assumption, and named here.

The shares of the peaks that are reached are 0.6 of the arithmetic and 0.8 of the memory's speed: OPT-13B on A100 reaches
0.82 and 0.64 (from the fits in DistServe's simulator); Yi-34B on two of them 0.5 to 0.6 in prompts, in decodes 0.36 alone
but 0.13 in a batch of 128 (from the measurements that come with Sarathi-Serve). Fit steps where absolute numbers count.
"""

from jaxserve.cost.forms import Roofline
from jaxserve.cost.model import CostModel, Host
from jaxserve.cost.sizes import Sizes, sizes_of
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.pallas_kernels.chips import CHIPS, Gpu, Tpu

FLOP_SHARE, BYTES_SHARE = 0.6, 0.8
# Assumed: seconds until a neighbour on a torus has a message, or the GPUs of a node have met for a collective; and between
# the end of one program on the device and the begin of the next.
_HOP_S, _MEET_S, _LAUNCH_S = 1e-6, 10e-6, 50e-6
_NETWORK_BYTES_PER_S = 25e9  # of a host in a data centre (https://jax-ml.github.io/scaling-book)
_COMPILE_S = 20.0  # assumed, of one size without a cache
# Rough, measured on two cores of an AMD EPYC through the whole engine: planning, inputs, results, text.
HOST = Host(step_s=0.35e-3, row_s=12e-6, token_s=0.25e-6)


def of_chip(
    chip: str | Tpu | Gpu,
    cfg: ModelConfig,
    *,
    tensor: int = 1,
    expert: int = 1,
    sequence: int = 1,
    itemsize: int = 2,
    kv_itemsize: int | None = None,
    block_size: int = 32,
    flop_share: float = FLOP_SHARE,
    bytes_share: float = BYTES_SHARE,
    host: Host = HOST,
) -> CostModel:
    """The cost model of one replica of a model on `tensor * expert * sequence` devices of a chip. Sliding windows are left
    out: what such a layer does not read counts, too.

    Args:
      chip: of `pallas_kernels.chips`, or its name there.
      itemsize: bytes of a weight and of an activation. With 1, products run at the 8-bit peak; with 4 at half of the 16-bit
        one (TF32 on NVIDIA's chips; rough for others).
      kv_itemsize: of a number in the KV pool; None: the same.

    Raises:
      ConfigError: the chip is unknown, or so many devices cannot share the model.
    """
    if isinstance(chip, str):
        if chip not in CHIPS:
            raise ConfigError(f"the chip {chip!r} is unknown", remedy=f"Known: {', '.join(CHIPS)}")
        chip = CHIPS[chip]
    kv_itemsize = kv_itemsize or itemsize
    sizes = sizes_of(cfg, tensor=tensor, expert=expert, sequence=sequence)
    peak = {1: chip.flop8_per_s, 4: chip.flop_per_s / 2}.get(itemsize, chip.flop_per_s)
    num_devices = tensor * expert * sequence
    link_bytes_per_s, wait_s = _links(chip, num_devices)
    device = roofline(
        sizes,
        cfg,
        flop_per_s=peak * flop_share,
        bytes_per_s=chip.hbm_bytes_per_s * bytes_share,
        itemsize=itemsize,
        kv_itemsize=kv_itemsize,
        link_bytes_per_s=link_bytes_per_s,
        wait_s=wait_s,
        launch_s=_LAUNCH_S,
    )
    return CostModel(
        name=f"{chip.name} x {num_devices}",
        device=device,
        host=host,
        block_bytes=sizes.kv_values * kv_itemsize * block_size,
        swap_bytes_per_s=chip.host_bytes_per_s,
        transfer_bytes_per_s=_NETWORK_BYTES_PER_S,
        compile_s=_COMPILE_S,
    )


def roofline(
    sizes: Sizes,
    cfg: ModelConfig,
    *,
    flop_per_s: float,
    bytes_per_s: float,
    itemsize: int,
    kv_itemsize: int,
    link_bytes_per_s: float,
    wait_s: float,
    launch_s: float,
) -> Roofline:
    """A model's sizes at given speeds. `wait_s`: of each collective, before anything arrives."""
    experts = cfg.experts
    return Roofline(
        flop_per_s=flop_per_s,
        bytes_per_s=bytes_per_s,
        token_flop=sizes.token_flop,
        row_flop=sizes.row_flop,
        pair_flop=sizes.pair_flop,
        weight_bytes=sizes.read_params * itemsize,
        kv_bytes=sizes.kv_values * kv_itemsize,
        token_bytes=sizes.token_values * itemsize,
        row_bytes=sizes.row_values * 4,
        expert_flop=sizes.expert_flop,
        expert_bytes=sizes.expert_params * itemsize,
        expert_share=experts.per_token / experts.count if experts else 0.0,
        token_link_s=sizes.sent_values * itemsize / link_bytes_per_s,
        collectives_s=sizes.num_collectives * wait_s,
        launch_s=launch_s,
    )


def _links(chip: Tpu | Gpu, num_devices: int) -> tuple[float, float]:
    """Bytes per second that a device sends in a collective, and seconds before anything arrives.

    On a torus along one axis: both ways round a ring, or to the only neighbour. Larger meshes could use more of the links.
    """
    if isinstance(chip, Tpu):
        return chip.link_bytes_per_s * min(2, max(num_devices - 1, 1)), 2 * (num_devices - 1) * _HOP_S
    if chip.num_links:
        return chip.link_bytes_per_s * chip.num_links, _MEET_S
    return chip.host_bytes_per_s, _MEET_S


def reference() -> CostModel:
    """A dense 8B model (32 layers of 4096, 131072 bytes of keys and values for a token) on an A100, in few round numbers: a
    step is one operation, and nothing hides the host. Comparisons with published schedulers are made on it."""
    device = Roofline(
        flop_per_s=0.6 * 312e12,
        bytes_per_s=0.8 * 2.039e12,
        token_flop=2 * 8e9,
        row_flop=0.0,
        pair_flop=524_288.0,
        weight_bytes=16e9,
        kv_bytes=131_072.0,
        overlaps_parts=True,
    )
    return CostModel(
        name="reference: 8B on A100",
        device=device,
        host=Host(step_s=3e-3),
        hidden=0.0,
        block_bytes=131_072.0 * 32,
        swap_bytes_per_s=25e9,
    )
