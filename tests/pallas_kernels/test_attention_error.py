"""How far each implementation is from the formula in float64, and from what bfloat16 allows."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.ragged_paged_attention import cpu
from jaxserve.pallas_kernels.ragged_paged_attention.cases import Case, make_arrays
from jaxserve.pallas_kernels.ragged_paged_attention.comparison import SCALE, call
from tests.pallas_kernels.attention import BACKENDS

ROWS = ((600, 1), (90, 1), (300, 140), (64, 64))
CASES = {
    "head 64": Case(rows=ROWS, page_size=32, head_size=64),
    "head 128": Case(rows=ROWS, page_size=32, head_size=128, num_heads=8),
    "window and soft cap": Case(rows=ROWS, page_size=32, head_size=64, window=100, soft_cap=5.0),
}


def by_row(case: Case, arrays: dict[str, np.ndarray]):
    """Queries [q k g h], keys and values [c k h], and bool[q c], which of them each query sees; row by row."""
    for row, (kv_len, q_len) in enumerate(case.rows):
        begin = arrays["q_start_s"][row]
        new = slice(begin, begin + q_len)
        table = arrays["table_sm"][row, : -(-kv_len // case.page_size)]
        kv_ckd = arrays["pages_pkbd"][table].transpose(0, 2, 1, 3).reshape(-1, case.num_kv_heads, 2 * case.head_size)
        kv_ckd = kv_ckd[:kv_len].copy()
        kv_ckd[kv_len - q_len :] = np.concatenate([arrays["k_tkh"][new], arrays["v_tkh"][new]], axis=2)
        behind_qc = np.arange(kv_len - q_len, kv_len)[:, None] - np.arange(kv_len)[None, :]
        seen_qc = (behind_qc >= 0) & (behind_qc < (case.window or kv_len))
        q_qkgh = arrays["q_tnh"][new].reshape(q_len, case.num_kv_heads, -1, case.head_size)
        yield q_qkgh, *np.split(kv_ckd, 2, axis=2), seen_qc


def softmax_sums(case: Case, arrays: dict[str, np.ndarray], np, dot) -> np.ndarray:
    """The formula, [t n h], with an array library and a product."""
    out = []
    for q_qkgh, k_ckh, v_ckh, seen_qc in by_row(case, arrays):
        scores_kgqc = dot("qkgh,ckh->kgqc", q_qkgh, k_ckh) * SCALE
        if case.soft_cap:
            scores_kgqc = case.soft_cap * np.tanh(scores_kgqc / case.soft_cap)
        scores_kgqc = np.where(seen_qc[None, None], scores_kgqc, -np.inf)
        weights_kgqc = np.exp(scores_kgqc - scores_kgqc.max(axis=3, keepdims=True))
        sums_kgqh = dot("kgqc,ckh->kgqh", weights_kgqc, v_ckh) / weights_kgqc.sum(axis=3, keepdims=True)
        out.append(np.moveaxis(sums_kgqh, 2, 0).reshape(-1, case.num_heads, case.head_size))
    return np.concatenate(out)


def exact(case: Case, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """All in float64."""
    return softmax_sums(
        case, arrays, np, lambda axes, a, b: np.einsum(axes, a.astype(np.float64), b.astype(np.float64))
    )


def dense_flash(case: Case, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """In one block, rounded as flash kernels round: factors in bfloat16, sums and softmax in float32, result in bfloat16."""

    def dot(axes: str, a, b):
        a, b = jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)
        return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)

    return np.asarray(softmax_sums(case, arrays, jnp, dot).astype(jnp.bfloat16), np.float64)


def rounded(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Floats as bfloat16 holds them."""
    return {
        name: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) if x.dtype == np.float32 else x
        for name, x in arrays.items()
    }


def outputs(case: Case, arrays: dict[str, np.ndarray], impl: str) -> np.ndarray:
    dtype = jnp.dtype(case.dtype)
    if impl == "cpu" and (reason := cpu.refusal(dtype, dtype, case.head_size)):
        pytest.skip(reason)
    return call(case, arrays, impl)[0][: arrays["q_start_s"][-1]]


def pairs(*impls: str) -> pytest.MarkDecorator:
    """Every case with every implementation; interpreted kernels take seconds each."""
    return pytest.mark.parametrize(
        ("name", "impl"),
        [
            pytest.param(name, impl, marks=[pytest.mark.slow] if impl == "tpu" and name != "head 64" else [])
            for name in CASES
            for impl in impls
        ],
    )


@pairs(*BACKENDS, "ref")
def test_float32_is_as_exact_as_float32_can_be(name: str, impl: str, native_folder):
    case, arrays = CASES[name], make_arrays(CASES[name])
    want = exact(case, arrays)
    error = np.abs(outputs(case, arrays, impl) - want).max()
    assert error <= 2e-6 * np.abs(want).max()


@pairs(*BACKENDS)
def test_bfloat16_is_no_worse_than_twice_a_dense_flash_kernel(name: str, impl: str, native_folder):
    case = dataclasses.replace(CASES[name], dtype="bfloat16")
    arrays = rounded(make_arrays(case))
    want = exact(case, arrays)
    errors, allowed = outputs(case, arrays, impl) - want, dense_flash(case, arrays) - want
    assert np.sqrt((errors**2).mean()) <= 2 * np.sqrt((allowed**2).mean())
    assert np.abs(errors).max() <= 2 * np.abs(allowed).max()
