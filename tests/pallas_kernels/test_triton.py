"""What the Triton backend decides before anything is launched; its numbers are in `test_ragged_paged_attention.py`."""

import sys

import jax
import jax.numpy as jnp
import pytest

from jaxserve.pallas_kernels import dispatch
from jaxserve.pallas_kernels.ragged_paged_attention import op, triton, triton_ahead
from jaxserve.pallas_kernels.ragged_paged_attention.cases import CASES, MODELS, make_arrays, shapes_of

A100, T4 = triton.Chip(80, 108), triton.Chip(75, 40)


def plan(chip: triton.Chip, model: str = "llama-3-8b", **options):
    """Launches by name."""
    arrays, static = shapes_of(MODELS[model], **({"num_tokens": 1024, "num_rows": 64} | options))
    return {launch.kernel: launch for launch, _ in triton_ahead.planned(chip, arrays, static)}


@pytest.fixture
def without_jax_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)


@pytest.mark.usefixtures("without_jax_triton")
def test_without_jax_triton_the_error_says_what_to_install():
    arrays = make_arrays(CASES["decode"])
    with pytest.raises(NotImplementedError, match=r"jax-triton .* pip install 'jaxserve\[gpu,triton\]'"):
        jax.jit(lambda x: op.ragged_paged_attention(**x, scale=0.3, impl="triton"))(arrays)


@pytest.mark.usefixtures("without_jax_triton")
def test_without_jax_triton_a_gpu_runs_xla(monkeypatch):
    monkeypatch.setattr(dispatch, "target_platform", lambda: "gpu")
    bfloat16 = jnp.dtype("bfloat16")
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_size": 128, "page_size": 16}
    assert op.chosen(**sizes, dtype=bfloat16, kv_dtype=bfloat16, pool_dtype=bfloat16) == "xla"


def test_with_jax_triton_other_platforms_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", sys)
    assert triton.refusal() == "only NVIDIA GPUs"


def test_decodes_alone_have_no_tiles():
    assert set(plan(A100, num_tokens=64)) == {"write_pages", "attend_decodes", "merge_splits"}
    assert set(plan(A100)) == {"write_pages", "attend_tiles", "attend_decodes", "merge_splits"}


def test_contexts_too_short_to_split_are_not_merged():
    assert "merge_splits" not in plan(A100, table_width=4)


def test_factors_are_of_a_type_that_the_chip_multiplies():
    assert plan(A100)["attend_tiles"].shape.dot_dtype == "bfloat16"
    assert plan(T4)["attend_tiles"].shape.dot_dtype == "float32"
    assert plan(T4, dtype=jnp.float16)["attend_tiles"].shape.dot_dtype == "float32"
    assert plan(A100, dtype=jnp.float16, kv_dtype=jnp.int8)["attend_tiles"].shape.dot_dtype == "float16"
    assert plan(A100, dtype=jnp.float16, kv_dtype=jnp.bfloat16)["attend_tiles"].shape.dot_dtype == "float32"


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scales_of_another_sign_are_refused(scale: float):
    arrays, static = shapes_of(MODELS["llama-3-8b"], num_tokens=64, num_rows=64)
    with pytest.raises(NotImplementedError, match="scales above 0"):
        triton_ahead.planned(A100, arrays, static | {"scale": scale})
