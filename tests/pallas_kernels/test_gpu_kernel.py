"""The kernel for Hopper against the formula, its own Python run on CPU (see `emulated_gpu.py`). `scripts/gpu_check.py` runs
the same cases on a real GPU."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from emulated_gpu import stand_ins

from jaxserve.pallas_kernels.ragged_paged_attention import gpu, gpu_attend, op, tuned
from jaxserve.pallas_kernels.ragged_paged_attention.cases import CASES, MODELS, Case, make_arrays, shapes_of
from jaxserve.pallas_kernels.ragged_paged_attention.comparison import call
from tests.pallas_kernels import attention

HERE = {name: case for name, case in CASES.items() if case.kv_dtype is None and case.dtype != "float16"}


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(gpu, "compute_capability", lambda: "9.0")


@pytest.fixture
def emulated(monkeypatch, on_hopper):
    for name, module in stand_ins().items():
        monkeypatch.setattr(gpu_attend, name, module)


def assert_equals_the_formula(case: Case, seed: int = 0) -> None:
    attention.assert_equals_the_formula(dataclasses.replace(case, dtype="bfloat16"), "gpu", seed)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", HERE)
def test_equals_the_formula(name: str):
    assert_equals_the_formula(HERE[name])


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("decode past several chunks", 2),
        ("decode past several chunks", 7),
        ("window past several chunks", 3),
        ("sinks", 2),
        ("mixed", 7),
        ("head 256", 3),
    ],
)
def test_parts_of_a_context_are_merged(name: str, parts: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuned, "gpu_parts", lambda num_programs, most_keys: parts)
    assert_equals_the_formula(HERE[name])


@pytest.mark.usefixtures("emulated")
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed: int, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.choice([1, 2]))
    lengths = [int(rng.integers(0, 40 if rng.random() < 0.6 else 500)) for _ in range(rng.integers(1, 9))]
    rows = tuple((n, 0 if n == 0 else 1 if rng.random() < 0.5 else int(rng.integers(1, n + 1))) for n in lengths)
    monkeypatch.setattr(tuned, "gpu_parts", lambda num_programs, most_keys: int(rng.integers(1, 5)))
    case = Case(
        rows=rows,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * int(rng.choice([1, 2, 7])),
        head_size=int(rng.choice([16, 64, 80, 128])),
        page_size=int(rng.choice([8, 16, 64, 128, 256])),
        window=None if rng.random() < 0.5 else int(rng.integers(1, 300)),
        has_sinks=bool(rng.random() < 0.3),
        padding=int(rng.integers(0, 9)),
    )
    assert_equals_the_formula(case, seed)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("rows", [(64, 64), (1020, 64)])
@pytest.mark.parametrize("model", MODELS)
def test_becomes_a_kernel_for_hopper(model: str, rows: tuple[int, int]):
    """As far as this can be told without NVIDIA's compiler, for which see `test_gpu_compiler.py`."""
    arrays, options = shapes_of(MODELS[model], num_tokens=rows[0], num_rows=rows[1])
    jitted = jax.jit(functools.partial(op.ragged_paged_attention, **options, impl="gpu"))
    assert "mosaic_gpu" in jitted.trace(**arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (CASES["decode"], "16-bit floats"),
        (CASES["int8 pool of a bfloat16 model"], "16-bit floats"),
        (dataclasses.replace(CASES["bfloat16"], head_size=40), "multiple of 16"),
        (dataclasses.replace(CASES["bfloat16"], page_size=4), "at least 8"),
        (dataclasses.replace(CASES["bfloat16"], num_heads=65, num_kv_heads=1), "at most 64"),
    ],
)
def test_refusals(case: Case, reason: str):
    with pytest.raises(NotImplementedError, match=reason):
        call(case, make_arrays(case), "gpu")


@pytest.mark.parametrize("capability", ["8.0", "10.0", ""])
def test_other_chips_are_refused(capability: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "compute_capability", lambda: capability)
    with pytest.raises(NotImplementedError, match="Hopper"):
        call(CASES["bfloat16"], make_arrays(CASES["bfloat16"]), "gpu")
