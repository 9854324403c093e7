import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_interpreter

from jaxserve.pallas_kernels.grouped_matmul import op, triton
from jaxserve.pallas_kernels.grouped_matmul.cases import CASES, Case, make_arrays


def tolerance(case: Case, out_dtype: jnp.dtype) -> float:
    """Of the largest product: rounding of the sums, which are float32, and then of the result."""
    return 2e-7 * case.size**0.5 + (0 if out_dtype == jnp.float32 else float(jnp.finfo(out_dtype).eps))


@functools.partial(jax.jit, static_argnames=("out_dtype", "impl"))
def run(x_mi, w_xoi, sizes_x, out_dtype, impl):
    if impl == "triton":
        return triton.multiply_on(triton.Chip(80, 4), interpreted, x_mi, w_xoi, sizes_x, out_dtype)
    return op.grouped_matmul(x_mi, w_xoi, sizes_x, out_dtype, impl=impl)


def interpreted(shape, grid, arrays, result):
    if reason := triton_interpreter.refusal():
        pytest.skip(reason)
    return triton_interpreter.interpret(triton.kernel(), grid, arrays, (), 0, [result], shape=shape)[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("impl", ["cpu", "xla", "ref", pytest.param("triton", marks=pytest.mark.triton)])
def test_equals_numpy_group_by_group(impl, case):
    """Rows of no group and weights of empty groups are NaN, and must not be seen."""
    arrays = make_arrays(case)
    x_mi, w_xoi = jnp.asarray(arrays["x_mi"], case.dtype), jnp.asarray(arrays["w_xoi"], case.dtype)
    if impl == "xla":  # on CPU it is a product of all rows with all weights, masked by a multiplication with zero
        w_xoi = jnp.nan_to_num(w_xoi)
        x_mi = jnp.nan_to_num(x_mi)
    ends = np.cumsum(case.sizes)
    want = [
        np.asarray(x_mi[end - size : end], np.float64) @ np.asarray(w_oi, np.float64).T
        for w_oi, size, end in zip(w_xoi, case.sizes, ends, strict=True)
    ]
    for out_dtype in {jnp.dtype("float32"), jnp.dtype(case.dtype)}:
        got_mo = run(x_mi, w_xoi, arrays["sizes_x"], out_dtype, impl)
        assert got_mo.dtype == out_dtype
        assert got_mo.shape == (case.num_rows, case.width)
        for part, end, size in zip(want, ends, case.sizes, strict=True):
            limit = tolerance(case, out_dtype) * np.abs(part).max(initial=1)
            np.testing.assert_allclose(got_mo[end - size : end].astype(np.float32), part, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loop_never_converts_or_copies_all_weights(dtype):
    """XLA on CPU would like to, for a slice of a narrow float: that costs as much as all experts do."""
    shapes = ((16, 64), jnp.dtype(dtype)), ((32, 96, 64), jnp.dtype(dtype)), ((32,), jnp.int32)
    arguments = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in shapes]
    compiled = run.lower(*arguments, out_dtype=jnp.dtype("float32"), impl="cpu").compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * 96 * 64


def test_the_reference_by_hand():
    x_mi = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    w_xoi = jnp.array([[[1.0, 0.0]], [[9.0, 9.0]], [[0.0, 10.0]]])
    np.testing.assert_array_equal(run(x_mi, w_xoi, np.array([1, 0, 1]), jnp.dtype("float32"), "ref"), [[1], [40], [0]])


def test_an_unknown_implementation_is_named():
    with pytest.raises(
        ValueError, match="grouped_matmul has no implementation 'cuda'; there are: cpu, triton, xla, ref"
    ):
        op.grouped_matmul(jnp.zeros((1, 2)), jnp.zeros((1, 3, 2)), jnp.zeros(1, jnp.int32), impl="cuda")
