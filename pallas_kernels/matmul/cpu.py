"""Our own product for bfloat16 on x86 with AVX-512: `cpu.cc`, compiled on first use and called through XLA's FFI.

Decoding reads every weight once; this takes 60 % of the time of XLA's product for one row, and two thirds for 32.
Subnormal numbers count as zero, as always with these instructions. Where there is no compiler or the processor lacks them
it refuses, and XLA's product is used.
"""

import ctypes
import functools
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
import jax.numpy as jnp

from jaxserve.pallas_kernels.matmul import xla

_SOURCE = Path(__file__).with_name("cpu.cc")
_FLAGS = ("-std=c++20", "-O3", "-w", "-shared", "-fPIC")
_INSTRUCTIONS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16")
_TARGETS = {"float32": "MatmulToFloat32", "bfloat16": "MatmulToBFloat16"}  # dtype of the result -> symbol in cpu.cc
_MIN_WEIGHTS = 1 << 18  # below, waking other threads costs more than it brings

_log = logging.getLogger(__name__)
_folder: Path | None = None
_verdict: str | None = None  # what `_register` returned; asked once, because a compiler that fails may take its time
_lock = threading.Lock()  # programs are traced in several threads


def enable(folder: Path | None) -> None:
    """Let the product be compiled into `folder`, and used in what is traced from then on. None: refuse."""
    global _folder
    _folder = folder


def refusal() -> str:
    """Why the product cannot be used on this machine, or nothing."""
    if jax.default_backend() != "cpu":
        return "only CPU"
    global _verdict
    with _lock:
        if _folder is None:
            return "not enabled"
        if _verdict is None:
            _verdict = _register(_folder)
        return _verdict


def matmul(x_ti, w_oi, out_dtype):
    """See `op.matmul`."""
    if x_ti.dtype != jnp.bfloat16 or w_oi.dtype != jnp.bfloat16:
        raise NotImplementedError("only bfloat16")
    if str(out_dtype) not in _TARGETS:
        raise NotImplementedError(f"only results of {' or '.join(_TARGETS)}")
    if w_oi.size < _MIN_WEIGHTS:
        raise NotImplementedError(f"only weights of at least {_MIN_WEIGHTS} values")
    reason = refusal()
    if reason:
        raise NotImplementedError(reason)
    # A program may be compiled here for another platform, ahead of time.
    return jax.lax.platform_dependent(
        x_ti,
        w_oi,
        cpu=functools.partial(_call, out_dtype=out_dtype),
        default=functools.partial(xla.matmul, out_dtype=out_dtype),
    )


def _call(x_ti, w_oi, out_dtype):
    out = jax.ShapeDtypeStruct((x_ti.shape[0], w_oi.shape[0]), out_dtype)
    return jax.ffi.ffi_call(_ffi_name(_TARGETS[str(out_dtype)]), out)(x_ti, w_oi)


def _ffi_name(symbol):
    return f"jaxserve_{symbol}"


def _register(folder: Path) -> str:
    """Compile and load the library, and tell XLA of it. Returns why that is impossible, or nothing."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"only x86-64, not {platform.machine()}"
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    try:
        library = ctypes.CDLL(str(compile_library(compiler, folder)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("the bfloat16 product is XLA's: %s", error)
        return str(error)
    library.IsSupported.restype = ctypes.c_bool
    if not library.IsSupported():
        return "this processor has no AVX-512 for bfloat16"
    for symbol in _TARGETS.values():
        jax.ffi.register_ffi_target(_ffi_name(symbol), jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return ""


def compile_library(compiler: str | None, folder: Path) -> Path:
    """The path of the compiled library; made if it is not there. Two processes may do so at once."""
    flags = (*_FLAGS, *_INSTRUCTIONS, f"-I{jax.ffi.include_dir()}")
    key = hashlib.sha256(repr((_SOURCE.read_text(), flags, jax.__version__)).encode()).hexdigest()[:16]
    target = folder / f"matmul-{key}.so"
    if target.exists():
        return target
    if compiler is None:
        raise OSError("there is no C++ compiler (c++, g++ or clang++)")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fresh = Path(scratch) / target.name
        command = [compiler, *flags, str(_SOURCE), "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)  # noqa: S603  our own source
        if done.returncode:
            raise OSError(f"{compiler} cannot compile {_SOURCE.name}: {done.stderr.strip()[:300]}")
        os.replace(fresh, target)
    return target
