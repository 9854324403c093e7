"""Comparing an implementation with the formula: for tests, and on the chip itself for `scripts/gpu_check.py`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.ragged_paged_attention.cases import Case
from jaxserve.pallas_kernels.ragged_paged_attention.op import ragged_paged_attention

SCALE = 0.3
Results = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # output, pool and lse, in float32


class Comparison(NamedTuple):
    """How far a call's results are from the formula's."""

    error: float  # largest of the output
    lse_error: float
    fault: str  # what is wrong; empty if nothing is


def tolerance(case: Case) -> float:
    """Largest error of a weighted mean of values of size 1: float32 sums, or factors rounded to 8 or 11 bits."""
    return {"float32": 1e-5, "bfloat16": 3e-2, "float16": 3e-3}[case.dtype]


def random_case(seed: int) -> Case:
    """Rows of 0 to 700 tokens, up to 23 of them, with heads, pages and windows of many sizes."""
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.choice([1, 2, 3]))
    lengths = [int(rng.integers(0, 40 if rng.random() < 0.6 else 700)) for _ in range(rng.integers(1, 24))]
    rows = tuple((n, 0 if n == 0 else 1 if rng.random() < 0.5 else int(rng.integers(1, n + 1))) for n in lengths)
    return Case(
        rows=rows,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * int(rng.choice([1, 2, 7])),
        head_size=int(rng.choice([16, 40, 64, 80])),
        dtype=str(rng.choice(["float32", "bfloat16"])),
        page_size=int(rng.choice([16, 32, 64, 128])),
        window=None if rng.random() < 0.5 else int(rng.integers(1, 500)),
        padding=int(rng.integers(0, 9)),
    )


def program(
    impl: str, window: int | None, soft_cap: float | None, max_q_len: int | None, kv_dtype: str, wants_lse: bool
) -> Callable[..., Any]:
    """A jitted call: arrays in, output, pool as `kv_dtype` and lse out."""

    @jax.jit
    def run(inputs):
        done = ragged_paged_attention(
            **inputs,
            scale=SCALE,
            window=window,
            soft_cap=soft_cap,
            kv_dtype=jnp.dtype(kv_dtype),
            max_q_len=max_q_len,
            wants_lse=wants_lse,
            impl=impl,
        )
        return done.out_tnh, jax.lax.bitcast_convert_type(done.pages_pkbd, jnp.dtype(kv_dtype)), done.lse_tn

    return run


def call(
    case: Case,
    arrays: dict[str, np.ndarray],
    impl: str,
    *,
    as_bits: bool = False,
    wants_lse: bool = False,
    make_program: Callable[..., Callable[..., Any]] = program,
) -> Results:
    """Run a case on the default device. `as_bits` keeps the pool as unsigned integers."""
    dtype, kv_dtype = jnp.dtype(case.dtype), jnp.dtype(case.kv_dtype or case.dtype)
    inputs = {
        name: jnp.asarray(x, dtype if name in ("q_tnh", "k_tkh", "v_tkh") else None) for name, x in arrays.items()
    }
    inputs["pages_pkbd"] = jnp.asarray(arrays["pages_pkbd"], kv_dtype)
    if as_bits:
        inputs["pages_pkbd"] = jax.lax.bitcast_convert_type(inputs["pages_pkbd"], f"uint{kv_dtype.itemsize * 8}")
    run = make_program(impl, case.window, case.soft_cap, case.max_q_len, str(kv_dtype), wants_lse)
    out, pages, lse = run(inputs)
    return _float32(out), _float32(pages), None if lse is None else _float32(lse)


def compare(case: Case, results: Results, expected: Results) -> Comparison:
    """Results of `call` with `wants_lse` against those of "ref": outputs and lse of real tokens, the pool bit by bit."""
    (out, pages, lse), (expected_out, expected_pages, expected_lse) = results, expected
    assert lse is not None and expected_lse is not None
    real = sum(q for _, q in case.rows)
    error, lse_error = _largest(out[:real] - expected_out[:real]), _largest(lse[:real] - expected_lse[:real])
    fault = ""
    if not np.isfinite(out).all():
        fault = "a number that must not be read was read"
    elif not error <= tolerance(case):
        fault = f"the output is wrong by {error:.2g}, allowed is {tolerance(case):g}"
    elif not np.array_equal(pages, expected_pages, equal_nan=True):
        fault = "the pool is wrong"
    elif not lse_error <= tolerance(case) + 2e-6 * _largest(expected_lse[:real]):  # of logits far larger than values
        fault = f"lse is wrong by {lse_error:.2g}, allowed is {tolerance(case):g}"
    return Comparison(error, lse_error, fault)


def _float32(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float32)


def _largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max(initial=0.0))
