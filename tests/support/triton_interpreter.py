"""Launches of the Triton backend in Triton's interpreter, on NumPy arrays."""

import os
import sys

import jax
import numpy as np

from jaxserve.pallas_kernels.cubin import type_name


def refusal() -> str:
    """Why kernels cannot be interpreted in this process, or nothing. Triton looks at the environment when it is imported."""
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        return "this process compiles Triton kernels: set TRITON_INTERPRET=1"
    os.environ["TRITON_INTERPRET"] = "1"
    return ""


def call(launch, arrays, integers, updated: int, created):
    """`triton.Call` of paged attention: what a launch creates begins as nan, what it updates as a copy of what was given."""
    from jaxserve.pallas_kernels.ragged_paged_attention import triton_kernels

    kernel = getattr(triton_kernels, launch.kernel)
    return interpret(kernel, launch.grid, arrays, integers, updated, created, shape=launch.shape)


def interpret(kernel, grid, arrays, integers, updated: int, created, **constants):
    """Run a kernel on arrays, integers, results: the last `updated` arrays, changed, and those `created`."""
    first = len(arrays) - updated
    shapes = [*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[first:]), *created]

    def run(*arrays):
        inputs = [np.array(x) for x in arrays]
        results = [*inputs[first:], *(np.full(x.shape, np.nan, x.dtype) for x in created)]
        _multiply_bfloat16()
        kernel[grid](*map(Buffer, inputs), *integers, *map(Buffer, results), **constants)
        return tuple(results)

    return jax.pure_callback(run, tuple(shapes), *arrays)


class Buffer:
    """An array with the few methods of a torch tensor that the interpreter calls."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = type_name(array.dtype).removeprefix("*")

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Buffer":
        return self

    def cpu(self) -> "Buffer":
        return self

    def new_empty(self, *_, **__) -> "Buffer":
        return Buffer(self.array)

    def set_(self, *_) -> None:
        pass

    def copy_(self, *_) -> None:
        pass

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    stride = size


def _multiply_bfloat16() -> None:
    """The interpreter keeps bfloat16 as bits and multiplies those: give `tl.dot` the numbers."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if hasattr(builder, "create_plain_dot"):
        return
    builder.create_plain_dot = builder.create_dot

    def as_float32(x):
        if x.dtype.name != "bf16":
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    builder.create_dot = lambda a, b, *rest: builder.create_plain_dot(as_float32(a), as_float32(b), *rest)
