"""Every implementation against the formula, with NaN wherever nothing may be read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.ragged_paged_attention import cpu, op
from jaxserve.pallas_kernels.ragged_paged_attention.cases import CASES, Case, make_arrays
from jaxserve.pallas_kernels.ragged_paged_attention.op import ragged_paged_attention

BACKENDS = [name for name in op.IMPLEMENTATIONS if name != "ref"]


@pytest.fixture(autouse=True)
def native_or_skip(request, native_folder):
    """Our own kernel is there where the machine can compile and run it."""
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    float32 = jnp.dtype("float32")
    if values.get("impl") == "cpu" and (reason := cpu.refusal(float32, float32, 64)):
        pytest.skip(reason)


def takes(impl: str, name: str) -> bool:
    """Whether an implementation takes a case; the others are in `test_what_our_own_kernel_refuses`."""
    return impl != "cpu" or CASES[name].dtype != "float16"


ALL = [(name, impl) for impl in BACKENDS for name in CASES if takes(impl, name)]
NARROW = [(name, impl) for name, impl in ALL if CASES[name].dtype != "float32"]


def tolerance(dtype: str) -> float:
    """Largest error of a weighted mean of values of size 1: float32 sums, or factors rounded to 8 or 11 bits."""
    return {"float32": 1e-5, "bfloat16": 3e-2, "float16": 3e-3}[dtype]


def call(
    case: Case, arrays: dict[str, np.ndarray], impl: str, *, as_bits: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    dtype = jnp.dtype(case.dtype)
    floats = {name: jnp.asarray(arrays[name], dtype) for name in ("q_tnh", "k_tkh", "v_tkh", "pages_pk2bh")}
    if as_bits:
        floats["pages_pk2bh"] = jax.lax.bitcast_convert_type(floats["pages_pk2bh"], f"uint{dtype.itemsize * 8}")
    longest = max((q for _, q in case.rows), default=0)

    @jax.jit
    def run(inputs: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, pages = ragged_paged_attention(
            **inputs,
            scale=0.3,
            window=case.window,
            max_q_len=1 if longest == 1 else None,
            kv_dtype=dtype,
            impl=impl,
        )
        return out, jax.lax.bitcast_convert_type(pages, dtype)

    out, pages = run(floats | {name: arrays[name] for name in ("table_sm", "q_start_s", "kv_len_s")})
    return np.asarray(out, np.float32), np.asarray(pages, np.float32)


@pytest.mark.parametrize(("name", "impl"), ALL)
def test_equals_the_formula(name: str, impl: str):
    case = CASES[name]
    arrays = make_arrays(case)
    expected, expected_pages = call(case, arrays, "ref")
    out, pages = call(case, arrays, impl)
    real = arrays["q_start_s"][-1]
    assert np.isfinite(out).all(), "a number that must not be read was read"
    np.testing.assert_allclose(out[:real], expected[:real], atol=tolerance(case.dtype), rtol=0)
    np.testing.assert_array_equal(pages, expected_pages)


@pytest.mark.parametrize(("name", "impl"), NARROW)
def test_a_pool_stored_as_bits_gives_the_same(name: str, impl: str):
    arrays = make_arrays(CASES[name])
    for plain, bits in zip(call(CASES[name], arrays, impl), call(CASES[name], arrays, impl, as_bits=True), strict=True):
        np.testing.assert_array_equal(plain, bits)


@pytest.mark.slow
@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("seed", range(60))
def test_random_shapes(seed: int, impl: str):
    rng = np.random.default_rng(seed)
    page_size = int(rng.choice([8, 16, 32, 64, 128]))
    kv_heads = int(rng.choice([1, 2, 3]))
    lengths = [int(rng.integers(0, 40 if rng.random() < 0.6 else 700)) for _ in range(rng.integers(1, 24))]
    rows = tuple((n, 0 if n == 0 else 1 if rng.random() < 0.5 else int(rng.integers(1, n + 1))) for n in lengths)
    case = Case(
        rows=rows,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * int(rng.choice([1, 2, 7])),
        head_size=int(rng.choice([16, 40, 64, 80])),
        dtype=str(rng.choice(["float32", "bfloat16"])),
        page_size=page_size,
        window=None if rng.random() < 0.5 else int(rng.integers(1, 500)),
        padding=int(rng.integers(0, 9)),
    )
    arrays = make_arrays(case, seed)
    (expected, expected_pages), (out, pages) = call(case, arrays, "ref"), call(case, arrays, impl)
    real = arrays["q_start_s"][-1]
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:real], expected[:real], atol=tolerance(case.dtype), rtol=0)
    np.testing.assert_array_equal(pages, expected_pages)


def test_the_reference_by_hand():
    """Two positions, one head of size 2, values 1 and 3: weights 1/4 and 3/4 when the scores differ by log 3."""
    log3 = float(np.log(3.0))
    pages = np.full((2, 1, 2, 2, 2), np.nan, np.float32)
    pages[1, 0, 0, 0], pages[1, 0, 1, 0] = (0.0, 0.0), (1.0, 10.0)
    out, after = ragged_paged_attention(
        q_tnh=jnp.asarray([[[1.0, 0.0]]]),
        k_tkh=jnp.asarray([[[2 * log3, 5.0]]]),
        v_tkh=jnp.asarray([[[3.0, 30.0]]]),
        pages_pk2bh=jnp.asarray(pages),
        table_sm=jnp.asarray([[1]]),
        q_start_s=jnp.asarray([0, 1]),
        kv_len_s=jnp.asarray([2]),
        scale=0.5,
        impl="ref",
    )
    np.testing.assert_allclose(out, [[[2.5, 25.0]]], rtol=1e-6)
    np.testing.assert_allclose(after[1, 0, :, 1], [[2 * log3, 5.0], [3.0, 30.0]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_our_own_kernel_refuses(dtype: str):
    case = dataclasses.replace(CASES["one token"], dtype=dtype, head_size=7)
    with pytest.raises(NotImplementedError, match="bfloat16"):
        call(case, make_arrays(case), "cpu")


def test_an_unknown_implementation_is_named():
    arrays = make_arrays(CASES["one token"])
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        call(CASES["one token"], arrays, "cuda")


def test_wrong_shapes_are_refused():
    arrays = make_arrays(CASES["mixed"])
    with pytest.raises(ValueError, match="must be one longer"):
        call(CASES["mixed"], arrays | {"q_start_s": arrays["q_start_s"][:-1]}, "xla")
