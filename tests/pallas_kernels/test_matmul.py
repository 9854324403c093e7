import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.matmul import cpu, op

SHAPES = [(1, 8, 4), (1, 1030, 896), (2, 515, 514), (5, 64, 8192), (6, 1024, 256), (7, 4097, 65), (33, 131, 2048)]


@pytest.fixture
def product(native_folder):
    """Our own product, compiled; skips where the machine cannot."""
    if reason := cpu.refusal():
        pytest.skip(reason)


@pytest.fixture
def small_weights(monkeypatch):
    monkeypatch.setattr(cpu, "_MIN_WEIGHTS", 0)


def factors(shape, dtype):
    tokens, rows, size = shape
    rng = np.random.default_rng(tokens * rows)
    return jnp.asarray(rng.standard_normal((tokens, size)), dtype), jnp.asarray(
        rng.standard_normal((rows, size)), dtype
    )


def assert_close(got, x_ti, w_oi):
    want = np.asarray(x_ti, np.float64) @ np.asarray(w_oi, np.float64).T
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("impl", ["xla", "ref"])
def test_equals_numpy(impl, shape, dtype):
    x_ti, w_oi = factors(shape, dtype)
    assert_close(jax.jit(op.matmul, static_argnames="impl")(x_ti, w_oi, impl=impl), x_ti, w_oi)


@pytest.mark.parametrize("shape", SHAPES)
def test_our_own_product_equals_numpy(shape, product, small_weights):
    x_ti, w_oi = factors(shape, jnp.bfloat16)
    got = jax.jit(op.matmul, static_argnames="impl")(x_ti, w_oi, impl="cpu")
    assert_close(got, x_ti, w_oi)
    rounded = jax.jit(lambda x, w: op.matmul(x, w, jnp.bfloat16, impl="cpu"))(x_ti, w_oi)
    np.testing.assert_array_equal(rounded, got.astype(jnp.bfloat16))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gated_product_equals_the_formula(dtype, has_bias):
    x_ti, w_oi = factors((5, 66, 40), dtype)
    bias_o = jnp.linspace(-1, 1, 66).astype(dtype) if has_bias else None
    want, got = (op.gated_matmul(x_ti, w_oi, bias_o, impl=impl) for impl in ("ref", "xla"))
    assert got.dtype == dtype
    np.testing.assert_allclose(got, want.astype(np.float32), rtol=3e-2 if dtype == jnp.bfloat16 else 1e-5, atol=5e-5)


@pytest.mark.parametrize(
    "shape", [(t, 2 * f, i) for t, f, i in ((1, 8, 4), (1, 515, 896), (7, 31, 65), (150, 97, 2048))]
)
def test_our_own_gated_product_equals_the_formula(shape, product, small_weights):
    x_ti, w_oi = factors(shape, jnp.bfloat16)
    want, got = (jax.jit(op.gated_matmul, static_argnames="impl")(x_ti, w_oi, impl=impl) for impl in ("ref", "cpu"))
    np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=1e-2, atol=1e-3)


def test_gates_may_be_extreme(product, small_weights):
    x_ti, w_oi = (
        jnp.ones((1, 1), jnp.bfloat16),
        jnp.asarray([[-300.0], [300.0], [0.0], [2.0], [2.0], [2.0]], jnp.bfloat16),
    )
    np.testing.assert_array_equal(op.gated_matmul(x_ti, w_oi, impl="cpu"), [[0.0, 600.0, 0.0]])


def test_our_own_product_reads_no_more_than_its_factors(product, small_weights):
    x_ti, w_oi = factors((3, 70, 45), jnp.bfloat16)
    x_around = jnp.full((5, 45), jnp.nan, jnp.bfloat16).at[1:4].set(x_ti)
    w_around = jnp.full((72, 45), jnp.nan, jnp.bfloat16).at[1:71].set(w_oi)
    got = jax.jit(lambda x, w: op.matmul(x[1:4], w[1:71], impl="cpu"))(x_around, w_around)
    assert_close(got, x_ti, w_oi)


def test_products_at_the_same_time_do_not_mix(product, small_weights):
    pairs = [factors((3, 400 + i, 64), jnp.bfloat16) for i in range(20)]
    results = jax.jit(lambda pairs: [op.matmul(x, w, impl="cpu") for x, w in pairs])(pairs)
    for got, (x_ti, w_oi) in zip(results, pairs, strict=True):
        assert_close(got, x_ti, w_oi)


def test_what_our_own_product_refuses(product):
    x_ti, w_oi = factors((2, 4, 8), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="at least"):
        op.matmul(x_ti, w_oi, impl="cpu")
    with pytest.raises(NotImplementedError, match="only bfloat16"):
        op.matmul(x_ti.astype(jnp.float32), w_oi.astype(jnp.float32), impl="cpu")
    assert op.chosen(jnp.dtype(jnp.bfloat16)) == "cpu"
    assert op.chosen(jnp.dtype(jnp.float32)) == "xla"


def test_where_our_own_product_cannot_be_used_it_is_xlas():
    assert op.chosen(jnp.dtype(jnp.bfloat16)) == "xla"
    x_ti, w_oi = factors((2, 600, 512), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="not enabled"):
        op.matmul(x_ti, w_oi, impl="cpu")
    assert_close(op.matmul(x_ti, w_oi), x_ti, w_oi)
