"""Triton for NVIDIA GPUs, called through jax-triton. XLA multiplies there all rows with all weights, and keeps all products.

A program takes one tile of rows of one group and some columns of its weight. How many tiles there are only the device knows;
the grid is as large as it can become, and programs past the end return. Tiles of one group follow each other, so that the
weight, if they share it, is in the cache.

Source: megablocks' grouped products, arXiv 2211.15841.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.grouped_matmul import tiles
from jaxserve.pallas_kernels.triton_gpu import Chip, chip_here, jax_triton, refusal


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is fixed when the kernel is compiled."""

    num_groups: int
    width: int
    size: int
    rows: int  # of a tile
    columns: int  # of a program
    chunk: int  # numbers of a sum that are read at once
    is_widened: bool  # factors become float32, where the chip has no product for them
    num_warps: int
    num_stages: int


# Runs `multiply` with a shape on a grid: (shape, grid, arrays, result) -> result
Call = Callable[[Shape, tuple[int, int], tuple[jax.Array, ...], jax.ShapeDtypeStruct], jax.Array]


def grouped_matmul(x_mi, w_xoi, sizes_x, out_dtype):
    """See `op.grouped_matmul`."""
    reason, chip = refusal(), chip_here()
    if reason or chip is None:
        raise NotImplementedError(reason)
    return multiply_on(chip, functools.partial(run, chip.capability), x_mi, w_xoi, sizes_x, out_dtype)


def multiply_on(chip: Chip, call: Call, x_mi, w_xoi, sizes_x, out_dtype):
    """Multiply with a launch made for a chip, run by `call`."""
    (num_rows, _), (_, width, _) = x_mi.shape, w_xoi.shape
    shape = shape_of(chip, x_mi, w_xoi)
    table = tiles.cut(sizes_x, num_rows, shape.rows)
    grid = (len(table.group_j), -(-width // shape.columns))
    arrays = (x_mi, w_xoi, table.group_j, table.row_j, table.end_j)
    return call(shape, grid, arrays, jax.ShapeDtypeStruct((num_rows, width), out_dtype))


def shape_of(chip: Chip, x_mi: Any, w_xoi: Any) -> Shape:
    """Few rows for a weight: small tiles, and much of the weight under way. Many: large ones, which use a weight often."""
    num_groups, width, size = w_xoi.shape
    is_widened = chip.capability < 80 and x_mi.dtype != jnp.float32
    is_wide = is_widened or x_mi.dtype == jnp.float32
    if x_mi.shape[0] <= 32 * num_groups:
        rows, columns, chunk, num_warps, num_stages = 16, 64, 64 if is_wide else 128, 4, 3
    else:
        rows, columns, chunk, num_warps, num_stages = (64, 32, 32, 4, 3) if is_wide else (64, 128, 64, 4, 3)
    return Shape(
        num_groups=num_groups,
        width=width,
        size=size,
        rows=rows,
        columns=columns,
        chunk=chunk,
        is_widened=is_widened,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def kernel() -> Any:
    """The `triton.jit` function."""
    return importlib.import_module("jaxserve.pallas_kernels.grouped_matmul.triton_kernels").multiply


def run(capability: int, shape: Shape, grid: tuple[int, int], arrays, result: jax.ShapeDtypeStruct):
    """`Call` for a GPU of a compute capability."""
    return jax_triton().triton_call(
        *arrays,
        kernel=kernel(),
        out_shape=result,
        grid=grid,
        name="grouped_matmul",
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        compute_capability=capability,
        shape=shape,
    )
