"""The real TPU compiler takes the kernels, for chips that are not here: no copy of the pool, and little memory beside it."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from jaxserve.pallas_kernels.ahead_of_time import CHIPS, compile_for, has_compiler
from jaxserve.pallas_kernels.ragged_paged_attention.op import ragged_paged_attention

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs the libtpu package")

# query heads, KV heads, head size, options
MODELS = {
    "llama-3-8b": (32, 8, 128, {}),
    "llama-3-70b": (64, 8, 128, {}),
    "llama-3-70b-tp8": (8, 1, 128, {}),
    "qwen3-0.6b": (16, 8, 128, {}),
    "qwen3-32b": (64, 8, 128, {}),
    "mistral": (32, 8, 128, {"window": 4096}),
    "llama-3.2-1b": (32, 8, 64, {}),
    "llama-2-7b": (32, 32, 128, {}),
    "gemma-2": (8, 4, 256, {"window": 4096, "soft_cap": 50.0}),
    "gpt-oss": (64, 8, 64, {"window": 128, "sinks": True}),
}
ROWS = {"decode": (64, 64, 1), "mixed": (1024, 64, None)}  # tokens, rows, max_q_len
COMMON = [("v5e", "llama-3-8b"), ("v6e", "llama-3.2-1b")]
NUM_PAGES, PAGE_SIZE, TABLE = 4093, 32, 128


def compile_attention(chip: str, model: str, rows: str, dtype=jnp.bfloat16, kv_dtype=None):
    num_heads, num_kv_heads, head_size, options = MODELS[model]
    num_tokens, num_rows, max_q_len = ROWS[rows]
    kv_dtype = jnp.dtype(kv_dtype or dtype)
    shape = jax.ShapeDtypeStruct
    extras = {"sinks_n": shape((num_heads,), jnp.float32)} if options.get("sinks") else {}
    if kv_dtype.itemsize == 1:
        extras["kv_scale_2k"] = shape((2, num_kv_heads), jnp.float32)
    static = {name: value for name, value in options.items() if name != "sinks"}

    def run(q_tnh, k_tkh, v_tkh, pages_pkbd, table_sm, q_start_s, kv_len_s, **extras):
        return ragged_paged_attention(
            q_tnh, k_tkh, v_tkh, pages_pkbd, table_sm, q_start_s, kv_len_s,
            scale=head_size**-0.5, max_q_len=max_q_len, **static, **extras,
        )  # fmt: skip

    args = (
        shape((num_tokens, num_heads, head_size), dtype),
        shape((num_tokens, num_kv_heads, head_size), dtype),
        shape((num_tokens, num_kv_heads, head_size), dtype),
        shape((NUM_PAGES, num_kv_heads, PAGE_SIZE, 2 * head_size), kv_dtype),
        shape((num_rows, TABLE), jnp.int32),
        shape((num_rows + 1,), jnp.int32),
        shape((num_rows,), jnp.int32),
    )
    names = tuple(extras)
    jitted = jax.jit(lambda *a: run(*a[:7], **dict(zip(names, a[7:], strict=True))), donate_argnums=3)
    return compile_for(chip, jitted, *args, *extras.values())


def assert_pool_stays(compiled, pool_bytes: int) -> None:
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 2, "the pool is copied"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # XLA cannot print some programs with asynchronous copies
        assert_no_copy(compiled.as_text())


def assert_no_copy(text: str) -> None:
    assert not re.findall(rf"= \w+\[{NUM_PAGES},[\d,]+\]\S* copy\(", text)
    assert "tpu_custom_call" in text


def pool_bytes(model: str, itemsize: int) -> int:
    _, num_kv_heads, head_size, _ = MODELS[model]
    return NUM_PAGES * num_kv_heads * PAGE_SIZE * 2 * head_size * itemsize


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("chip", "model"), COMMON)
def test_compiles_for_common_chips(chip: str, model: str, rows: str):
    assert_pool_stays(compile_attention(chip, model, rows), pool_bytes(model, 2))


@pytest.mark.slow
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_every_chip(chip: str, model: str, rows: str):
    assert_pool_stays(compile_attention(chip, model, rows), pool_bytes(model, 2))


@pytest.mark.slow
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "int8"), ("bfloat16", "float8_e4m3fn")],
)
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_compiles_for_other_types(chip: str, dtype: str, kv_dtype: str, rows: str):
    compiled = compile_attention(chip, "llama-3-8b", rows, jnp.dtype(dtype), kv_dtype)
    assert_pool_stays(compiled, pool_bytes("llama-3-8b", jnp.dtype(kv_dtype).itemsize))


def test_an_unknown_chip_is_named():
    with pytest.raises(ValueError, match="'v9' is unknown"):
        compile_for("v9", jax.jit(functools.partial(jnp.add, 1)), jnp.zeros(3))
