"""NVIDIA's compiler takes the Triton kernels, for GPUs that are not here, and keeps what they work on in registers.

`pip install -e '.[dev,triton]'`, then `pytest -n auto -m triton tests/pallas_kernels/test_triton_compiler.py`
"""

import sys

import jax
import pytest

from jaxserve.pallas_kernels.cubin import CAPABILITIES, SHARED_BYTES, compile_for, has_compiler, type_name
from jaxserve.pallas_kernels.grouped_matmul import triton as grouped
from jaxserve.pallas_kernels.ragged_paged_attention import triton, triton_ahead
from jaxserve.pallas_kernels.ragged_paged_attention.cases import MODELS, ModelShape, shapes_of
from jaxserve.pallas_kernels.triton_gpu import Chip

pytestmark = [pytest.mark.triton, pytest.mark.skipif(not has_compiler(), reason="needs the triton package")]

ODD = {
    "head 80": ModelShape(num_heads=32, num_kv_heads=32, head_size=80),
    "head 96": ModelShape(num_heads=32, num_kv_heads=32, head_size=96),
}
TYPES = [
    ("float16", "float16"),
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "int8"),
    ("bfloat16", "float8_e4m3fn"),
]


def compiled(chip: str, shape: ModelShape, dtype: str = "bfloat16", kv_dtype: str | None = None, **options):
    """The compiled kernels of a mixed call, by name."""
    _refuse_interpreter()
    arrays, static = shapes_of(shape, num_tokens=1024, num_rows=64, dtype=dtype, kv_dtype=kv_dtype)
    return triton_ahead.compiled(triton.Chip(CAPABILITIES[chip], 100), arrays, static | options)


def _refuse_interpreter() -> None:
    if sys.modules.get("triton") and sys.modules["triton"].knobs.runtime.interpret:
        pytest.skip("this process interprets Triton kernels: unset TRITON_INTERPRET")


def assert_fits(made, chip: str) -> None:
    for name, (launch, cubin) in made.items():
        assert cubin.stack_bytes == cubin.spills == 0, f"{name} spills"
        assert cubin.shared_bytes <= SHARED_BYTES[CAPABILITIES[chip]]
        assert cubin.registers * 32 * launch.num_warps <= 65536
        if launch.shape.dot_dtype != "float32" and name.startswith("attend"):
            assert cubin.products > 0, f"{name} does not use the matrix unit"


@pytest.mark.parametrize("model", [*MODELS, *ODD])
@pytest.mark.parametrize("chip", CAPABILITIES)
def test_compiles_for_every_chip(chip: str, model: str):
    assert_fits(compiled(chip, (MODELS | ODD)[model]), chip)


@pytest.mark.parametrize(("dtype", "kv_dtype"), TYPES)
@pytest.mark.parametrize("chip", CAPABILITIES)
def test_compiles_for_other_types(chip: str, dtype: str, kv_dtype: str):
    assert_fits(compiled(chip, MODELS["llama-3-8b"], dtype, kv_dtype, wants_lse=True), chip)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("num_rows", [64, 16384])
@pytest.mark.parametrize("chip", CAPABILITIES)
def test_grouped_products_compile_for_every_chip(chip: str, num_rows: int, dtype: str):
    _refuse_interpreter()
    x_mi, w_xoi = jax.ShapeDtypeStruct((num_rows, 2048), dtype), jax.ShapeDtypeStruct((32, 1536, 2048), dtype)
    shape = grouped.shape_of(Chip(CAPABILITIES[chip], 100), x_mi, w_xoi)
    pointers = [type_name(x) for x in (dtype, dtype, "int32", "int32", "int32", dtype)]
    sizes = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    cubin = compile_for(CAPABILITIES[chip], grouped.kernel(), pointers, {"shape": shape}, **sizes)
    assert cubin.stack_bytes == cubin.spills == 0
    assert cubin.shared_bytes <= SHARED_BYTES[CAPABILITIES[chip]]
    assert cubin.products > 0 or shape.is_widened or dtype == "float32"


@pytest.mark.parametrize("num_tokens", [64, 1024])
def test_jax_triton_updates_the_pool_in_place(num_tokens: int):
    """Needs JAX's CUDA plugin too, `pip install -e '.[gpu]'`, without which jax-triton cannot be imported; no GPU."""
    pytest.importorskip("jax_triton", exc_type=ImportError)
    arrays, static = shapes_of(MODELS["gpt-oss"], num_tokens=num_tokens, num_rows=64)
    launches = triton_ahead.planned(triton.Chip(80, 108), arrays, static)
    text = triton_ahead.lowered(triton.Chip(80, 108), arrays, static).as_text()
    calls = [line for line in text.splitlines() if "triton_kernel_call" in line]
    updated = [1 if launch.kernel == "write_pages" else 2 for launch, _ in launches]
    assert [line.count("output_operand_alias<") for line in calls] == updated
    assert "operand_index = 4," in calls[0]  # the pool's
