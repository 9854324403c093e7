"""How much memory there is: on this machine's devices, or on chips that are elsewhere."""

import dataclasses
import os
from pathlib import Path

from jaxserve.config import gpu_share
from jaxserve.errors import ConfigError
from jaxserve.pallas_kernels.chips import CHIPS, named, platform_of

_CPU_POOL_BYTES = 2 << 30  # a default pool takes at most this much host memory
_NAMES = ("bytes", "KiB", "MiB", "GiB", "TiB")
_UNITS = {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40} | {
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """The memory of some devices of one kind."""

    kind: str  # of device, as JAX calls it, or as the user does
    platform: str  # "tpu", "gpu" or "cpu"
    num_devices: int
    device_bytes: int  # that this process may have of each
    used_bytes: int = 0  # ... and has already
    is_host: bool = False  # all devices share the host's memory, and half of it is left to others

    def usable(self, utilization: float, num_used: int) -> int:
        """Bytes of each device to plan with, if so many are used."""
        if self.is_host:
            return int(self.device_bytes * utilization / 2) // num_used
        return int(self.device_bytes * utilization) - self.used_bytes

    def limit(self, num_used: int) -> int:
        """Bytes of each device that nothing can go beyond."""
        return self.device_bytes // num_used if self.is_host else self.device_bytes - self.used_bytes

    def default_pool(self, free: int, num_used: int) -> int:
        """Bytes of each device for a pool that the user gave no size, of those that are free.

        What is free of the host's memory is another number at each start, and programs of another pool would have to be
        compiled. So there it is rounded down, to three binary digits.
        """
        if not self.is_host:
            return free
        rounded = free >> (digits := max(free.bit_length() - 3, 0)) << digits
        return min(rounded, _CPU_POOL_BYTES // num_used)


def of_chip(chip: str, num_devices: int, device_bytes: int | None = None) -> Room:
    """Devices of a chip that is not here. `device_bytes`: if it is a variant with another amount of memory.

    Raises:
      ConfigError: the chip is unknown.
    """
    if chip not in CHIPS:
        raise ConfigError(f"the chip {chip!r} is unknown", remedy=f"Known: {', '.join(CHIPS)}; or give memory")
    platform, hbm_bytes = platform_of(chip), device_bytes or CHIPS[chip].hbm_bytes
    share = gpu_share() if platform == "gpu" else 1
    return Room(kind=CHIPS[chip].name, platform=platform, num_devices=num_devices, device_bytes=int(hbm_bytes * share))


def of_size(device_bytes: int, num_devices: int) -> Room:
    """Devices of which nothing is known but their memory; planned for as GPUs are."""
    return Room(kind="a device", platform="gpu", num_devices=num_devices, device_bytes=device_bytes)


def of_this_machine() -> Room:
    """The devices that JAX has; of those that other processes drive, it is assumed that they are like ours.

    Raises:
      ConfigError: the devices do not say how much memory they have.
    """
    import jax  # not at the top: it takes a second, and plans for other machines need no devices

    here = jax.local_devices()
    kind, platform, num_devices = here[0].device_kind, here[0].platform, jax.device_count()
    stats = [device.memory_stats() or {} for device in here]
    if platform == "cpu":
        device_bytes, used_bytes = free_host_bytes(), 0
    elif all("bytes_limit" in each for each in stats):
        device_bytes = min(int(each["bytes_limit"]) for each in stats)
        used_bytes = max(int(each.get("bytes_in_use", 0)) for each in stats)
    elif chip := named(kind):
        device_bytes, used_bytes = chip.hbm_bytes, 0
    else:
        raise ConfigError(f"the {kind} does not say how much memory it has", remedy="Unset XLA_PYTHON_CLIENT_ALLOCATOR")
    return Room(
        kind=kind,
        platform=platform,
        num_devices=num_devices,
        device_bytes=device_bytes,
        used_bytes=used_bytes,
        is_host=platform == "cpu",
    )


def free_host_bytes() -> int:
    """Bytes that can be allocated without swapping; total memory where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse_size(text: str) -> int:
    """ "24GiB" -> bytes.

    Raises:
      ConfigError: it is no such size.
    """
    number = text.strip().lower().rstrip("kmgtib")
    unit = text.strip().lower()[len(number) :]
    try:
        num_bytes = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise ConfigError(f"{text!r} is no amount of memory", remedy="Write it as 24GiB or 80GB") from None
    if not 1 <= num_bytes < 1 << 60:
        raise ConfigError(f"{text!r} is no amount of memory that a device can have", remedy="Write it as 24GiB or 80GB")
    return int(num_bytes)


def size_text(num_bytes: float) -> str:
    """Bytes in the unit that keeps the number below 1,024, three digits of it."""
    steps = 0
    while abs(num_bytes) >= 999.5 and steps < len(_NAMES) - 1:
        num_bytes, steps = num_bytes / 1024, steps + 1
    digits = max(0, 3 - len(str(int(abs(num_bytes))))) if steps else 0
    return f"{num_bytes:.{digits}f} {_NAMES[steps]}"
