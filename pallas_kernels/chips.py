"""The chips that we know: their names, the memory of a device, and what their compilers want to know.

`hbm_bytes` is what a program may use. For TPUs it is what their compiler says is available when a program needs too much;
for NVIDIA GPUs the total that the driver reports (`nvidia-smi`), which is less than data sheets say.

All speeds are peaks of data sheets, of a device, none measured here. Traps that the numbers avoid: NVIDIA's sheets give
products of sparse matrices, twice as fast, first; links are given for both ways together, here one way of one link; a
device of TPU7x is half of a chip.
"""

from dataclasses import dataclass

_GIB, _MIB = 1 << 30, 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Tpu:
    """A device: a whole chip, on TPU7x one of its two cores. Sources: https://cloud.google.com/tpu/docs; for links of v4
    and to hosts "How to Scale Your Model" (https://jax-ml.github.io/scaling-book); for TPU7x's memory JAX's own table."""

    name: str  # as JAX calls the kind of device
    topology: str  # the smallest slice that the compiler knows by name
    hbm_bytes: int
    hbm_bytes_per_s: int
    flop_per_s: float  # bfloat16
    flop8_per_s: float  # int8; of TPU7x float8
    link_bytes_per_s: float  # one way, one of the links to neighbours in the torus
    num_links: int
    host_bytes_per_s: float  # one way, from or to the host's memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Source: NVIDIA's data sheets, and the CUDA C++ Programming Guide, table 30."""

    name: str
    capability: str
    num_cores: int  # multiprocessors
    clock_ghz: float
    hbm_bytes: int
    hbm_bytes_per_s: int
    flop_per_s: float  # bfloat16, on T4 float16: it has no other; dense
    flop8_per_s: float  # float8, before Hopper (and L4) int8; dense
    link_bytes_per_s: float  # one way, one NVLink; all of them reach every other GPU of a node through switches
    num_links: int  # 0: GPUs talk over PCIe
    host_bytes_per_s: float  # one way, PCIe x16
    l2_bytes: int
    smem_bytes: int  # of a multiprocessor
    threads_per_core: int = 2048
    fpus_per_core: int = 128

    @property
    def compute(self) -> int:
        """The capability as compilers write it: 90 for "9.0"."""
        return int(self.capability.replace(".", ""))


TPUS = {
    # In the compiler's smallest slice a device of v4 is one of two cores, with half of the memory. JAX runs both as one.
    "v4": Tpu(
        name="TPU v4",
        topology="v4:2x2x1",
        hbm_bytes=int(30.75 * _GIB),
        hbm_bytes_per_s=1_228_000_000_000,
        flop_per_s=275e12,
        flop8_per_s=275e12,
        link_bytes_per_s=45e9,
        num_links=6,
        host_bytes_per_s=15e9,
    ),
    "v5e": Tpu(
        name="TPU v5 lite",
        topology="v5e:2x4",
        hbm_bytes=int(15.75 * _GIB),
        hbm_bytes_per_s=819_000_000_000,
        flop_per_s=197e12,
        flop8_per_s=394e12,
        link_bytes_per_s=50e9,
        num_links=4,
        host_bytes_per_s=15e9,
    ),
    "v5p": Tpu(
        name="TPU v5",
        topology="v5p:2x2x1",
        hbm_bytes=int(95.73 * _GIB),
        hbm_bytes_per_s=2_765_000_000_000,
        flop_per_s=459e12,
        flop8_per_s=918e12,
        link_bytes_per_s=100e9,
        num_links=6,
        host_bytes_per_s=15e9,
    ),
    "v6e": Tpu(
        name="TPU v6 lite",
        topology="v6e:2x2",
        hbm_bytes=int(31.24 * _GIB),
        hbm_bytes_per_s=1_638_000_000_000,
        flop_per_s=918e12,
        flop8_per_s=1836e12,
        link_bytes_per_s=100e9,
        num_links=4,
        host_bytes_per_s=32e9,
    ),
    # Half of a chip, whose links (not confirmed) both halves share. To the host: unknown, taken to be as that of v6e.
    "tpu7x": Tpu(
        name="TPU7x",
        topology="tpu7x:2x2x1",
        hbm_bytes=int(94.74 * _GIB),
        hbm_bytes_per_s=3_690_000_000_000,
        flop_per_s=1153.5e12,
        flop8_per_s=2307e12,
        link_bytes_per_s=50e9,
        num_links=6,
        host_bytes_per_s=16e9,
    ),
}

GPUS = {
    "t4": Gpu(
        name="Tesla T4",
        capability="7.5",
        num_cores=40,
        clock_ghz=1.59,
        hbm_bytes=15_360 * _MIB,
        hbm_bytes_per_s=320_000_000_000,
        flop_per_s=65e12,
        flop8_per_s=130e12,
        link_bytes_per_s=0.0,
        num_links=0,
        host_bytes_per_s=16e9,
        l2_bytes=4 * _MIB,
        smem_bytes=64 << 10,
        threads_per_core=1024,
        fpus_per_core=64,
    ),
    "a100-40gb": Gpu(
        name="NVIDIA A100-SXM4-40GB",
        capability="8.0",
        num_cores=108,
        clock_ghz=1.41,
        hbm_bytes=40_960 * _MIB,
        hbm_bytes_per_s=1_555_000_000_000,
        flop_per_s=312e12,
        flop8_per_s=624e12,
        link_bytes_per_s=25e9,
        num_links=12,
        host_bytes_per_s=32e9,
        l2_bytes=40 * _MIB,
        smem_bytes=164 << 10,
        fpus_per_core=64,
    ),
    "a100-80gb": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability="8.0",
        num_cores=108,
        clock_ghz=1.41,
        hbm_bytes=81_920 * _MIB,
        hbm_bytes_per_s=2_039_000_000_000,
        flop_per_s=312e12,
        flop8_per_s=624e12,
        link_bytes_per_s=25e9,
        num_links=12,
        host_bytes_per_s=32e9,
        l2_bytes=40 * _MIB,
        smem_bytes=164 << 10,
        fpus_per_core=64,
    ),
    "l4": Gpu(
        name="NVIDIA L4",
        capability="8.9",
        num_cores=58,
        clock_ghz=2.04,
        hbm_bytes=23_034 * _MIB,
        hbm_bytes_per_s=300_000_000_000,
        flop_per_s=121e12,
        flop8_per_s=242e12,
        link_bytes_per_s=0.0,
        num_links=0,
        host_bytes_per_s=32e9,
        l2_bytes=48 * _MIB,
        smem_bytes=100 << 10,
        threads_per_core=1536,
    ),
    "h100": Gpu(
        name="NVIDIA H100 80GB HBM3",
        capability="9.0",
        num_cores=132,
        clock_ghz=1.98,
        hbm_bytes=81_559 * _MIB,
        hbm_bytes_per_s=3_352_000_000_000,
        flop_per_s=989e12,
        flop8_per_s=1979e12,
        link_bytes_per_s=25e9,
        num_links=18,
        host_bytes_per_s=64e9,
        l2_bytes=50 * _MIB,
        smem_bytes=228 << 10,
    ),
    "h200": Gpu(
        name="NVIDIA H200",
        capability="9.0",
        num_cores=132,
        clock_ghz=1.98,
        hbm_bytes=143_771 * _MIB,
        hbm_bytes_per_s=4_800_000_000_000,
        flop_per_s=989e12,
        flop8_per_s=1979e12,
        link_bytes_per_s=25e9,
        num_links=18,
        host_bytes_per_s=64e9,
        l2_bytes=50 * _MIB,
        smem_bytes=228 << 10,
    ),
    "b200": Gpu(
        name="NVIDIA B200",
        capability="10.0",
        num_cores=148,
        clock_ghz=1.965,
        hbm_bytes=183_359 * _MIB,
        hbm_bytes_per_s=7_700_000_000_000,
        flop_per_s=2250e12,
        flop8_per_s=4500e12,
        link_bytes_per_s=50e9,
        num_links=18,
        host_bytes_per_s=64e9,
        l2_bytes=126 * _MIB,
        smem_bytes=228 << 10,
    ),
}

CHIPS: dict[str, Tpu | Gpu] = TPUS | GPUS


def platform_of(chip: str) -> str:
    """As JAX calls it: "tpu" or "gpu"."""
    return "tpu" if chip in TPUS else "gpu"


def named(kind: str) -> Tpu | Gpu | None:
    """The chip that JAX calls so; None if we do not know it."""
    return next((chip for chip in CHIPS.values() if chip.name == kind), None)


def resembling(kind: str) -> Tpu | Gpu | None:
    """The chip that JAX calls so, or for a GPU another variant of it ("NVIDIA H100 PCIe"); None if we know neither."""
    words = kind.replace("-", " ").lower().split()
    return named(kind) or next((gpu for name, gpu in GPUS.items() if name.split("-")[0] in words), None)
