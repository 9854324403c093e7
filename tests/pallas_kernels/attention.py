"""Running cases of ragged paged attention on any implementation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.ragged_paged_attention import op
from jaxserve.pallas_kernels.ragged_paged_attention.cases import Case, make_arrays
from jaxserve.pallas_kernels.ragged_paged_attention.op import ragged_paged_attention

BACKENDS = [name for name in op.IMPLEMENTATIONS if name not in ("ref", "gpu")]  # "gpu": see test_gpu_kernel.py
SCALE = 0.3


def refuses(impl: str, case: Case) -> bool:
    """Whether an implementation refuses a case; `test_refusals` holds it to that."""
    kv_dtype = case.kv_dtype or case.dtype
    if impl == "cpu":
        return kv_dtype != case.dtype or case.dtype == "float16"
    if impl == "tpu":
        return "float16" in (case.dtype, kv_dtype) or case.page_size % (32 // jnp.dtype(kv_dtype).itemsize) != 0
    return False


def tolerance(case: Case) -> float:
    """Largest error of a weighted mean of values of size 1: float32 sums, or factors rounded to 8 or 11 bits."""
    return {"float32": 1e-5, "bfloat16": 3e-2, "float16": 3e-3}[case.dtype]


def program(
    impl: str, window: int | None, soft_cap: float | None, max_q_len: int | None, kv_dtype: str, wants_lse: bool
) -> Callable:
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
    make_program: Callable[..., Callable] = program,
) -> tuple[np.ndarray, ...]:
    """Output, pool and lse as float32 arrays."""
    dtype, kv_dtype = jnp.dtype(case.dtype), jnp.dtype(case.kv_dtype or case.dtype)
    inputs = {
        name: jnp.asarray(x, dtype if name in ("q_tnh", "k_tkh", "v_tkh") else None) for name, x in arrays.items()
    }
    inputs["pages_pkbd"] = jnp.asarray(arrays["pages_pkbd"], kv_dtype)
    if as_bits:
        inputs["pages_pkbd"] = jax.lax.bitcast_convert_type(inputs["pages_pkbd"], f"uint{kv_dtype.itemsize * 8}")
    run = make_program(impl, case.window, case.soft_cap, case.max_q_len, str(kv_dtype), wants_lse)
    return tuple(None if x is None else np.asarray(x, np.float32) for x in run(inputs))


def assert_equals_the_formula(
    case: Case, impl: str, seed: int = 0, make_program: Callable[..., Callable] = program
) -> None:
    """Output, pool and lse of an implementation are those of `ref`, and nothing that is NaN was read."""
    arrays = make_arrays(case, seed)
    expected, expected_pages, expected_lse = call(case, arrays, "ref", wants_lse=True, make_program=make_program)
    out, pages, lse = call(case, arrays, impl, wants_lse=True, make_program=make_program)
    real = arrays["q_start_s"][-1]
    assert np.isfinite(out).all(), "a number that must not be read was read"
    np.testing.assert_allclose(out[:real], expected[:real], atol=tolerance(case), rtol=0)
    np.testing.assert_array_equal(pages, expected_pages)
    # Logits may be far larger than values, and are rounded before they are summed.
    np.testing.assert_allclose(lse[:real], expected_lse[:real], atol=tolerance(case), rtol=2e-6)
