"""What the checks run on."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import jax

from jaxserve.pallas_kernels.ragged_paged_attention.op import ORDER
from scripts.gpu.children import Result

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-triton", "triton", "tokamax", "torch")


def run(item: str) -> Iterator[Result]:
    """The device, and versions."""
    device = jax.devices()[0]
    is_cpu = device.platform == "cpu"
    facts: dict[str, Any] = {
        "platform": device.platform,
        "device": device.device_kind,
        "compute_capability": str(getattr(device, "compute_capability", "")),
        "memory_gib": round((device.memory_stats() or {}).get("bytes_limit", 0) / 2**30, 1),
        "driver": "" if is_cpu else _driver(),
        "backends": ["xla"] if is_cpu else list(ORDER["gpu"]),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }
    yield Result(item, "", "measured", "", facts)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    """As nvidia-smi says; empty where it cannot be asked."""
    if not (smi := shutil.which("nvidia-smi")):
        return ""
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""
