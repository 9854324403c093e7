"""Our own product for bfloat16 on x86 with AVX-512: `cpu.cc`, compiled on first use and called through XLA's FFI.

Decoding reads every weight once; this takes 60 % of the time of XLA's product for one row, and two thirds for 32.
Subnormal numbers count as zero, as always with these instructions. Where there is no compiler or the processor lacks them
it refuses, and XLA's product is used.
"""

from pathlib import Path

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels import native

_TARGETS = {"float32": "MatmulToFloat32", "bfloat16": "MatmulToBFloat16"}  # dtype of the result -> symbol in cpu.cc
_GATED = "GatedMatmul"
_LIBRARY = native.Library(Path(__file__).with_name("cpu.cc"), (*_TARGETS.values(), _GATED))
_MIN_WEIGHTS = 1 << 18  # below, waking other threads costs more than it brings


def matmul(x_ti, w_oi, out_dtype):
    """See `op.matmul`."""
    if str(out_dtype) not in _TARGETS:
        raise NotImplementedError(f"only results of {' or '.join(_TARGETS)}")
    _refuse(x_ti, w_oi)
    out = jax.ShapeDtypeStruct((x_ti.shape[0], w_oi.shape[0]), out_dtype)
    return jax.ffi.ffi_call(native.target(_TARGETS[str(out_dtype)]), out)(x_ti, w_oi)


def gated_matmul(x_ti, w_oi, bias_o):
    """See `op.gated_matmul`."""
    if bias_o is not None:
        raise NotImplementedError("no bias")
    _refuse(x_ti, w_oi)
    out = jax.ShapeDtypeStruct((x_ti.shape[0], w_oi.shape[0] // 2), x_ti.dtype)
    return jax.ffi.ffi_call(native.target(_GATED), out)(x_ti, w_oi)


def refusal() -> str:
    """Why the product cannot be used on this machine, or nothing."""
    return native.refusal(_LIBRARY)


def _refuse(x_ti, w_oi) -> None:
    if x_ti.dtype != jnp.bfloat16 or w_oi.dtype != jnp.bfloat16:
        raise NotImplementedError("only bfloat16")
    if w_oi.size < _MIN_WEIGHTS:
        raise NotImplementedError(f"only weights of at least {_MIN_WEIGHTS} values")
    if reason := refusal():
        raise NotImplementedError(reason)
