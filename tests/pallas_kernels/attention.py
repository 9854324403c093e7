"""Which cases of ragged paged attention an implementation takes on this machine, and whether it does them right."""

import functools
from collections.abc import Callable

import jax.numpy as jnp

from jaxserve.pallas_kernels.ragged_paged_attention import op
from jaxserve.pallas_kernels.ragged_paged_attention.cases import Case, make_arrays
from jaxserve.pallas_kernels.ragged_paged_attention.comparison import Program, Results, call, compare, program

# What runs here. "gpu": see test_gpu_kernel.py; "triton": an extra of test_ragged_paged_attention.py.
BACKENDS = [name for name in op.IMPLEMENTATIONS if name not in ("ref", "gpu", "triton")]


def refuses(impl: str, case: Case) -> bool:
    """Whether an implementation refuses a case; `test_refusals` holds it to that."""
    kv_dtype = case.kv_dtype or case.dtype
    if impl == "cpu":
        return kv_dtype != case.dtype or case.dtype == "float16"
    if impl == "tpu":
        return "float16" in (case.dtype, kv_dtype) or case.page_size % (32 // jnp.dtype(kv_dtype).itemsize) != 0
    return False


def assert_equals_the_formula(
    case: Case, impl: str, seed: int = 0, make_program: Callable[..., Program] = program
) -> None:
    """Output, pool and lse of an implementation are those of `ref`, and nothing that is NaN was read."""
    results = call(case, make_arrays(case, seed), impl, wants_lse=True, make_program=make_program)
    assert compare(case, results, _formula(case, seed, make_program)).fault == ""


@functools.lru_cache(64)  # all implementations are asked the same
def _formula(case: Case, seed: int, make_program: Callable[..., Program]) -> Results:
    return call(case, make_arrays(case, seed), "ref", wants_lse=True, make_program=make_program)
