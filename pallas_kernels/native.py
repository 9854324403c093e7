"""C++ kernels for CPU: compiled on first use, loaded, and called through XLA's FFI.

A kernel describes its file with a `Library` and asks `refusal` before each use. Where there is no compiler, or the
processor lacks AVX-512 for bfloat16, that gives a reason, and XLA's implementation is used.
"""

import ctypes
import dataclasses
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax

from jaxserve.pallas_kernels.platform import target_platform

_HEADER = Path(__file__).with_name("native.h")
_FLAGS = ("-std=c++20", "-O3", "-w", "-shared", "-fPIC", f"-I{_HEADER.parent}")
_INSTRUCTIONS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16")

_log = logging.getLogger(__name__)
_folder: Path | None = None
_lock = threading.Lock()  # programs are traced in several threads


@dataclasses.dataclass(frozen=True)
class Library:
    """One C++ file and the FFI handlers it exports."""

    source: Path
    symbols: tuple[str, ...]


# What `_register` returned. A verdict stands as long as the process, because a compiler that fails may take its time.
_verdicts: dict[Library, str] = {}


def enable(folder: Path | None) -> None:
    """Let libraries be compiled into `folder`, and used in what is traced from then on. None: refuse."""
    global _folder
    _folder = folder


def refusal(library: Library) -> str:
    """Why a library cannot be used on this machine, or nothing. Compiles and loads it when asked for the first time."""
    if target_platform() != "cpu":
        return "only CPU"
    with _lock:
        if _folder is None:
            return "not enabled"
        if library not in _verdicts:
            _verdicts[library] = _register(library, _folder)
        return _verdicts[library]


def target(symbol: str) -> str:
    """The name under which XLA knows a handler."""
    return f"jaxserve_{symbol}"


def _register(library: Library, folder: Path) -> str:
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"only x86-64, not {platform.machine()}"
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    try:
        loaded = ctypes.CDLL(str(compile_library(compiler, library.source, folder)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("%s is not used: %s", library.source.name, error)
        return str(error)
    loaded.IsSupported.restype = ctypes.c_bool
    if not loaded.IsSupported():
        return "this processor has no AVX-512 for bfloat16"
    for symbol in library.symbols:
        jax.ffi.register_ffi_target(target(symbol), jax.ffi.pycapsule(getattr(loaded, symbol)), platform="cpu")
    return ""


def compile_library(compiler: str | None, source: Path, folder: Path) -> Path:
    """The path of the compiled library; made if it is not there. Two processes may do so at once.

    Raises:
      OSError: there is no compiler, or it fails; with its message.
      subprocess.TimeoutExpired: it takes over two minutes.
    """
    flags = (*_FLAGS, *_INSTRUCTIONS, f"-I{jax.ffi.include_dir()}")
    texts = (source.read_text(), _HEADER.read_text())
    key = hashlib.sha256(repr((texts, flags, jax.__version__)).encode()).hexdigest()[:16]
    compiled = folder / f"{source.parent.name}-{key}.so"
    if compiled.exists():
        return compiled
    if compiler is None:
        raise OSError("there is no C++ compiler (c++, g++ or clang++)")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fresh = Path(scratch) / compiled.name
        command = [compiler, *flags, str(source), "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)  # noqa: S603  our own source
        if done.returncode:
            raise OSError(f"{compiler} cannot compile {source.parent.name}/{source.name}: {done.stderr.strip()[:300]}")
        os.replace(fresh, compiled)
    return compiled
