"""The real TPU compiler takes the kernels, for chips that are not here: no copy of the pool, and little memory beside it."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxserve.pallas_kernels.ahead_of_time import compile_for, compile_on, has_compiler, slice_devices
from jaxserve.pallas_kernels.chips import TPUS
from jaxserve.pallas_kernels.grouped_matmul.op import grouped_matmul
from jaxserve.pallas_kernels.platform import target_platform
from jaxserve.pallas_kernels.ragged_paged_attention.cases import MODELS, ModelShape, shapes_of
from jaxserve.pallas_kernels.ragged_paged_attention.op import ragged_paged_attention

pytestmark = [
    pytest.mark.skipif(not has_compiler(), reason="needs the libtpu package"),
    pytest.mark.usefixtures("optimized"),
]

ROWS = {"decode": (64, 64), "mixed": (1024, 64)}  # tokens, rows
COMMON = [("v5e", "llama-3-8b"), ("v6e", "llama-3.2-1b")]
# Each shape as decodes for one chip and mixed for another, and many shapes for each chip: a compilation takes seconds.
SHAPES = list({shape: name for name, shape in MODELS.items()}.values())
COVERING = [
    (list(TPUS)[(2 * i + j) % len(TPUS)], model, rows) for i, model in enumerate(SHAPES) for j, rows in enumerate(ROWS)
]


def compile_attention(chip: str, model: ModelShape, rows: str, dtype: str = "bfloat16", **others):
    """The compiled call, and the bytes of its pool."""
    num_tokens, num_rows = ROWS[rows]
    arrays, options = shapes_of(model, num_tokens=num_tokens, num_rows=num_rows, dtype=jnp.dtype(dtype), **others)
    pool = arrays.pop("pages_pkbd")
    attend = jax.jit(lambda pool, rest: ragged_paged_attention(pages_pkbd=pool, **rest, **options), donate_argnums=0)
    return compile_for(chip, attend, pool, arrays), math.prod(pool.shape) * pool.dtype.itemsize


def assert_pool_stays(compiled, pool_bytes: int) -> None:
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 2, "the pool is copied"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # XLA cannot print some programs with asynchronous copies
        assert_no_copy(compiled.as_text())


def assert_no_copy(text: str) -> None:
    assert not re.findall(r"= \w+\[4093,[\d,]+\]\S* copy\(", text)
    assert "tpu_custom_call" in text


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("chip", "model"), COMMON)
def test_compiles_for_common_chips(chip: str, model: str, rows: str):
    assert_pool_stays(*compile_attention(chip, MODELS[model], rows))


@pytest.mark.slow
@pytest.mark.parametrize(("chip", "model", "rows"), COVERING)
def test_compiles_for_every_chip(chip: str, model: str, rows: str):
    assert_pool_stays(*compile_attention(chip, MODELS[model], rows))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "int8"), ("bfloat16", "float8_e4m3fn")],
)
@pytest.mark.parametrize(("chip", "rows"), [("v5e", "mixed"), ("v6e", "decode")])
def test_compiles_for_other_types(chip: str, dtype: str, kv_dtype: str, rows: str):
    assert_pool_stays(*compile_attention(chip, MODELS["llama-3-8b"], rows, dtype, kv_dtype=kv_dtype))


@pytest.mark.slow
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("head_size", [80, 96])
def test_odd_head_sizes_do_not_copy_the_pool(head_size: int, rows: str):
    """In a pool of 128: with a last axis of 160 or 192 XLA would keep pages in lanes, and turn the pool around and back."""
    shape = ModelShape(num_heads=32, num_kv_heads=8, head_size=head_size)
    assert_pool_stays(*compile_attention("v5e", shape, rows, pool_head_size=128))


def test_an_unknown_chip_is_named():
    with pytest.raises(ValueError, match="'v9' is unknown"):
        compile_for("v9", jax.jit(functools.partial(jnp.add, 1)), jnp.zeros(3))


def test_a_slice_is_told_by_its_chips():
    """v5p-32 in Google's words: 32 cores, which are 16 chips, each one device."""
    devices = slice_devices("v5p:2x2x4")
    assert [device.device_kind for device in devices] == ["TPU v5"] * 16
    assert len({tuple(device.coords) for device in devices}) == 16


@pytest.mark.parametrize(
    ("topology", "message"), [("v9:2x2", "no known chip"), ("v5e:3x7", "knows no slice 'v5e:3x7'")]
)
def test_an_unknown_slice_is_named(topology: str, message: str):
    with pytest.raises(ValueError, match=message):
        slice_devices(topology)


def test_a_program_for_a_slice_has_a_text_and_the_memory_of_a_device():
    mesh = Mesh(np.array(slice_devices("v6e:2x2")), ("all",), axis_types=(AxisType.Auto,))

    def gather(x):
        assert target_platform() == "tpu"
        return jax.lax.all_gather(x, "all", tiled=True)

    jitted = jax.jit(
        jax.shard_map(gather, mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec(), check_vma=False)
    )
    x = jax.ShapeDtypeStruct((4096, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("all")))
    program = compile_on(mesh, jitted, x)
    assert "all-gather" in program.text
    memory = program.compiled.memory_analysis()
    assert (memory.argument_size_in_bytes, memory.output_size_in_bytes) == (1024 * 128 * 4, 4096 * 128 * 4)


@pytest.mark.parametrize("num_rows", [512, 16384])
def test_grouped_products_are_a_kernel_that_takes_weights_as_they_are(num_rows: int):
    """XLA's own. Were it to multiply all rows with all weights, or to turn these around, memory would show it."""
    shapes = ((num_rows, 2048), (32, 1536, 2048))
    factors = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    compiled = compile_for("v5e", jax.jit(grouped_matmul), *factors, jax.ShapeDtypeStruct((32,), jnp.int32))
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20
    # A kernel of tiles; since libtpu 0.0.52 a product that skips what is of other groups.
    assert re.search("tpu_custom_call|SKIPPER_MODE_GROUP_STARTS", compiled.as_text())
