"""What this device can do at best, measured: bytes copied and products computed per second."""

import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.kernels.timing import Loop

COPY_BYTES, MATRIX = 2 << 30, 8192  # far more than any cache; large enough for full speed
_REPEATS = 5


class Limits(NamedTuple):
    """Rates that kernels are compared with."""

    copy_bytes_per_s: float  # read and written, both counted
    matmul_flops_per_s: float  # of bfloat16, summed in float32


def measure(copy_bytes: int = COPY_BYTES, matrix: int = MATRIX) -> Limits:
    """Medians. Data is random: on zeros, chips use less power and run faster."""
    copies, products = [], []
    numbers = jax.random.bits(jax.random.key(0), (copy_bytes // 4,), jnp.uint32)
    copy = jax.jit(jnp.copy)
    jax.block_until_ready(copy(numbers))
    for _ in range(_REPEATS):
        begin_s = time.perf_counter()
        for _ in range(4):  # the device has long to do; starting the next one from Python costs nothing
            copied = copy(numbers)
        jax.block_until_ready(copied)
        copies.append(4 * 2 * copy_bytes / (time.perf_counter() - begin_s))
    del numbers, copied

    keys = jax.random.split(jax.random.key(1))
    a, b = (jax.random.normal(key, (matrix, matrix), jnp.bfloat16) for key in keys)
    b = b / jnp.bfloat16(matrix**0.5)
    loop = Loop(lambda a, state, b: ((a @ b).astype(a.dtype), state), a, (), b, 10)
    loop.seconds(())
    for _ in range(_REPEATS):
        seconds, _ = loop.seconds(())
        products.append(2 * matrix**3 / seconds)
    return Limits(statistics.median(copies), statistics.median(products))
