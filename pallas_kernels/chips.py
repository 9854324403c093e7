"""The chips that we know: their names, the memory of a device, and what their compilers want to know.

`hbm_bytes` is what a program may use. For TPUs it is what their compiler says is available when a program needs too much;
for NVIDIA GPUs the total that the driver reports (`nvidia-smi`), which is less than data sheets say.
"""

from dataclasses import dataclass

_GIB, _MIB = 1 << 30, 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Tpu:
    """A device: a whole chip, on TPU7x one of its two cores. Source: https://cloud.google.com/tpu/docs."""

    name: str  # as JAX calls the kind of device
    topology: str  # the smallest slice that the compiler knows by name
    hbm_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """Source: NVIDIA's data sheets, and the CUDA C++ Programming Guide, table 30."""

    name: str
    capability: str
    num_cores: int  # multiprocessors
    clock_ghz: float
    hbm_bytes: int
    hbm_bytes_per_s: int
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
    "v4": Tpu(name="TPU v4", topology="v4:2x2x1", hbm_bytes=int(30.75 * _GIB)),
    "v5e": Tpu(name="TPU v5 lite", topology="v5e:2x4", hbm_bytes=int(15.75 * _GIB)),
    "v5p": Tpu(name="TPU v5", topology="v5p:2x2x1", hbm_bytes=int(95.73 * _GIB)),
    "v6e": Tpu(name="TPU v6 lite", topology="v6e:2x2", hbm_bytes=int(31.24 * _GIB)),
    "tpu7x": Tpu(name="TPU7x", topology="tpu7x:2x2x1", hbm_bytes=int(94.74 * _GIB)),
}

GPUS = {
    "t4": Gpu(
        name="Tesla T4",
        capability="7.5",
        num_cores=40,
        clock_ghz=1.59,
        hbm_bytes=15_360 * _MIB,
        hbm_bytes_per_s=320_000_000_000,
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
