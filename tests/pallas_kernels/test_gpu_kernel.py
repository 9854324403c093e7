"""The kernel for Hopper against the formula, its own Python run on CPU (see `emulated_gpu.py`). `scripts/gpu_check.py` runs
the same cases on a real GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated_gpu import stand_ins

from jaxserve.pallas_kernels.ragged_paged_attention import gpu, op, tuned
from jaxserve.pallas_kernels.ragged_paged_attention.cases import CASES, Case, make_arrays

HERE = {name: case for name, case in CASES.items() if case.kv_dtype is None and case.dtype != "float16"}
TOLERANCE = 2e-2  # of weighted means of values of size 1: weights and results rounded to 8 bits


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    for name, module in stand_ins().items():
        monkeypatch.setattr(gpu, name, module)
    monkeypatch.setattr(gpu, "compute_capability", lambda: "9.0")


def attend(case: Case, impl: str, seed: int = 0):
    """Output, pool and lse as float32 arrays, and how many tokens there are."""
    arrays = make_arrays(case, seed)
    dtype = jnp.dtype(case.dtype)
    narrow = {name: jnp.asarray(arrays[name], dtype) for name in ("q_tnh", "k_tkh", "v_tkh", "pages_pkbd")}
    options = {
        "scale": 0.3,
        "window": case.window,
        "soft_cap": case.soft_cap,
        "max_q_len": 1 if max((q for _, q in case.rows), default=0) == 1 else None,
        "wants_lse": True,
        "impl": impl,
    }

    @jax.jit
    def run(inputs):
        done = op.ragged_paged_attention(**inputs, **options)
        return [x.astype(jnp.float32) for x in done if x is not None]

    out = run({name: jnp.asarray(x) for name, x in arrays.items()} | narrow)
    return *(np.asarray(x) for x in out), arrays["q_start_s"][-1]


def assert_equals_the_formula(case: Case, seed: int = 0) -> None:
    case = dataclasses.replace(case, dtype="bfloat16")
    expected, expected_pages, expected_lse, real = attend(case, "ref", seed)
    out, pages, lse, _ = attend(case, "gpu", seed)
    assert np.isfinite(out).all(), "a number that must not be read was read"
    np.testing.assert_allclose(out[:real], expected[:real], atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(pages, expected_pages)
    np.testing.assert_allclose(lse[:real], expected_lse[:real], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", HERE)
def test_equals_the_formula(name: str):
    assert_equals_the_formula(HERE[name])


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("name", ["decode past several chunks", "window past several chunks", "sinks", "mixed"])
def test_parts_of_a_context_are_merged(name: str, parts: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuned, "gpu_parts", lambda num_programs, most_keys: parts)
    assert_equals_the_formula(HERE[name])
