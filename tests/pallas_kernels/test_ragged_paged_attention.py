"""Every implementation against the formula, with NaN wherever nothing may be read.

Triton's kernels run in its interpreter, which takes its time: `pip install -e '.[dev,triton]'`, then

    TRITON_INTERPRET=1 pytest -n auto -m triton tests/pallas_kernels/test_ragged_paged_attention.py
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import triton_interpreter
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels import interpreter
from jaxserve.pallas_kernels.ragged_paged_attention import cpu, op, triton
from jaxserve.pallas_kernels.ragged_paged_attention.cases import CASES, Case, make_arrays
from jaxserve.pallas_kernels.ragged_paged_attention.comparison import call, tolerance
from jaxserve.pallas_kernels.ragged_paged_attention.op import ragged_paged_attention
from tests.pallas_kernels.attention import BACKENDS, assert_equals_the_formula, refuses

EVERYWHERE = [*BACKENDS, "triton"]
CHIP = triton.Chip(89, 4)  # so few cores that some rows are split and some are not


@pytest.fixture(autouse=True)
def native_or_skip(request, native_folder, monkeypatch):
    """Our C++ kernel is there where the machine can compile and run it; TPU kernels are interpreted, watching for races."""
    monkeypatch.setattr(interpreter, "PARAMS", pltpu.InterpretParams(detect_races=True))
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    float32 = jnp.dtype("float32")
    if values.get("impl") == "cpu" and (reason := cpu.refusal(float32, float32, 64)):
        pytest.skip(reason)
    if values.get("impl") == "triton":
        pytest.importorskip("triton")
        if reason := triton_interpreter.refusal():
            pytest.skip(reason)
        interpreted = functools.partial(triton.attend_on, CHIP, triton_interpreter.call)
        monkeypatch.setitem(op.IMPLEMENTATIONS, "triton", interpreted)


def marked(*values):
    """Parameters of a test, the last being the implementation."""
    return pytest.param(*values, marks=[pytest.mark.triton] if values[-1] == "triton" else [])


PAIRS = [(name, impl) for impl in EVERYWHERE for name in CASES]
TAKEN = [(name, impl) for name, impl in PAIRS if not refuses(impl, CASES[name])]
NARROW = [(name, impl) for name, impl in TAKEN if jnp.dtype(CASES[name].dtype).itemsize < 4 and impl != "tpu"]


@pytest.mark.parametrize(("name", "impl"), [marked(*pair) for pair in TAKEN])
def test_equals_the_formula(name: str, impl: str, capfd: pytest.CaptureFixture[str]):
    assert_equals_the_formula(CASES[name], impl)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(("name", "impl"), [marked(*pair) for pair in NARROW])
def test_a_pool_stored_as_bits_gives_the_same(name: str, impl: str):
    arrays = make_arrays(CASES[name])
    plain, bits = (call(CASES[name], arrays, impl, as_bits=as_bits) for as_bits in (False, True))
    np.testing.assert_array_equal(plain[0], bits[0])
    np.testing.assert_array_equal(plain[1], bits[1])


@pytest.mark.parametrize(("name", "impl"), [marked(*pair) for pair in PAIRS if pair not in TAKEN])
def test_refusals(name: str, impl: str):
    with pytest.raises(NotImplementedError):
        call(CASES[name], make_arrays(CASES[name]), impl)


@pytest.mark.triton
@pytest.mark.parametrize("impl", ["triton"])
@pytest.mark.parametrize("capability", [75, 80])
@pytest.mark.parametrize("name", ["bfloat16 window", "float8 pool"])
def test_old_gpus_give_the_same(name: str, capability: int, impl: str, monkeypatch):
    """No bfloat16 in matrix units before Ampere, no float8 before Ada."""
    arrays = make_arrays(CASES[name])
    expected = call(CASES[name], arrays, impl)
    interpreted = functools.partial(triton.attend_on, triton.Chip(capability, 4), triton_interpreter.call)
    monkeypatch.setitem(op.IMPLEMENTATIONS, "triton", interpreted)
    out, pages, _ = call(CASES[name], arrays, impl)
    np.testing.assert_allclose(out, expected[0], atol=tolerance(CASES[name]), rtol=0)
    np.testing.assert_array_equal(pages, expected[1])


@pytest.mark.triton
@pytest.mark.parametrize("impl", ["triton"])
def test_long_contexts_are_merged_from_many_splits(impl: str, monkeypatch):
    """More than are read at once."""
    interpreted = functools.partial(triton.attend_on, triton.Chip(89, 40), triton_interpreter.call)
    monkeypatch.setitem(op.IMPLEMENTATIONS, "triton", interpreted)
    case = Case(rows=((2100, 1), (3, 1), (40, 9)), num_kv_heads=1, num_heads=2, page_size=64, has_sinks=True)
    assert_equals_the_formula(case, impl)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("impl", [marked(impl) for impl in EVERYWHERE if impl != "tpu"])
def test_pages_may_hold_few_tokens(impl: str, page_size: int):
    assert_equals_the_formula(dataclasses.replace(CASES["mixed"], page_size=page_size), impl)


@pytest.mark.parametrize("impl", BACKENDS)
def test_a_wider_pool_gives_the_same(impl: str):
    """As on TPU, where a head of 80 or 96 takes the room of 128."""
    arrays = make_arrays(CASES["head 80"])
    halves = np.split(arrays["pages_pkbd"], 2, axis=3)
    # What is not to be read is nan in its whole width; what is stored ends in zeros.
    ends = [np.where(np.isnan(half[..., :1]), np.nan, 0.0) + np.zeros(48, np.float32) for half in halves]
    wide = arrays | {"pages_pkbd": np.concatenate([halves[0], ends[0], halves[1], ends[1]], axis=3, dtype=np.float32)}
    expected, results = (call(CASES["head 80"], x, impl, wants_lse=True) for x in (arrays, wide))
    real = arrays["q_start_s"][-1]
    np.testing.assert_allclose(results.out_tnh[:real], expected.out_tnh[:real], atol=1e-5)
    np.testing.assert_allclose(results.lse_tn[:real], expected.lse_tn[:real], atol=1e-5)
    for half, end in zip(
        np.split(expected.pages_pkbd, 2, axis=3), np.split(results.pages_pkbd, 2, axis=3), strict=True
    ):
        np.testing.assert_array_equal(end[..., :80], half)
        np.testing.assert_array_equal(end[..., 80:], np.where(np.isnan(half[..., :48]), np.nan, 0.0))


def test_the_reference_by_hand():
    """Two positions, one head of size 2, values 1 and 3: weights 1/4 and 3/4 when the scores differ by log 3."""
    log3 = float(np.log(3.0))
    pages = np.full((2, 1, 2, 4), np.nan, np.float32)
    pages[1, 0, 0] = (0.0, 0.0, 1.0, 10.0)
    out, after, lse = ragged_paged_attention(
        q_tnh=jnp.asarray([[[1.0, 0.0]]]),
        k_tkh=jnp.asarray([[[2 * log3, 5.0]]]),
        v_tkh=jnp.asarray([[[3.0, 30.0]]]),
        pages_pkbd=jnp.asarray(pages),
        table_sm=jnp.asarray([[1]]),
        q_start_s=jnp.asarray([0, 1]),
        kv_len_s=jnp.asarray([2]),
        scale=0.5,
        wants_lse=True,
        impl="ref",
    )
    np.testing.assert_allclose(out, [[[2.5, 25.0]]], rtol=1e-6)
    np.testing.assert_allclose(after[1, 0, 1], [2 * log3, 5.0, 3.0, 30.0])
    np.testing.assert_allclose(lse, [[np.log(4.0)]], rtol=1e-6)


def test_an_unknown_implementation_is_named():
    arrays = make_arrays(CASES["one token"])
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        call(CASES["one token"], arrays, "cuda")


WRONG = {
    "must be one longer": {"q_start_s": np.zeros(3, np.int32)},
    "twice the head size": {"pages_pkbd": np.zeros((4, 2, 16, 16), np.float32)},
    "not a power of two": {"pages_pkbd": np.zeros((4, 2, 24, 32), np.float32)},
    "not a multiple of 3": {
        "pages_pkbd": np.zeros((4, 3, 16, 32), np.float32),
        "k_tkh": np.zeros((CASES["mixed"].num_tokens, 3, 16), np.float32),
        "v_tkh": np.zeros((CASES["mixed"].num_tokens, 3, 16), np.float32),
    },
    "sinks_n.shape": {"sinks_n": np.zeros(3, np.float32)},
    "kv_scale_2k.shape": {"kv_scale_2k": np.zeros((2, 5), np.float32)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_shapes_are_refused_by_name(message: str):
    case = CASES["mixed"]
    with pytest.raises(ValueError, match=message):
        call(case, make_arrays(case) | WRONG[message], "xla")


@pytest.mark.parametrize("options", [{"window": 0}, {"soft_cap": 0.0}, {"soft_cap": -1.0}])
def test_wrong_options_are_refused_by_name(options: dict[str, float]):
    case = dataclasses.replace(CASES["mixed"], **options)
    with pytest.raises(ValueError, match=next(iter(options))):
        call(case, make_arrays(case), "xla")


def test_an_int8_pool_needs_scales():
    case = CASES["int8 pool"]
    arrays = make_arrays(case)
    del arrays["kv_scale_2k"]
    with pytest.raises(ValueError, match="kv_scale_2k is needed"):
        call(case, arrays, "xla")
