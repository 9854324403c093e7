"""The real compilers for NVIDIA GPUs take the kernel for Hopper, without a GPU: no copy of the pool, no spilt registers.

pip install -e '.[gpu]' && pytest -m cuda      # 4 GB of packages, so not part of scripts/test
"""

import functools
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxserve.pallas_kernels.ahead_of_time import compile_for, has_gpu_compiler
from jaxserve.pallas_kernels.ragged_paged_attention.cases import MODELS, ModelShape, shapes_of
from jaxserve.pallas_kernels.ragged_paged_attention.op import ragged_paged_attention

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not has_gpu_compiler(), reason="needs jax[cuda13]"),
    pytest.mark.usefixtures("optimized"),
    pytest.mark.filterwarnings("ignore"),  # the plugin's, that there is no GPU
]

SHAPES = MODELS | {
    "head 80": ModelShape(num_heads=32, num_kv_heads=32, head_size=80),
    "head 96": ModelShape(num_heads=32, num_kv_heads=8, head_size=96),
    "seven heads to one": ModelShape(num_heads=28, num_kv_heads=4),
}
ROWS = {"decode": (64, 64), "mixed": (1020, 64)}  # tokens, rows
FEW = (2, 2)
SPILLS = {
    ("gemma-2", "mixed")
}  # 128 sums of a row in registers leave too few for the rest: about 100 bytes of a thread


def compile_attention(shape: ModelShape, rows: str, **others):
    """The compiled call, and the bytes of its pool."""
    num_tokens, num_rows = ROWS.get(rows, FEW)
    arrays, options = shapes_of(shape, num_tokens=num_tokens, num_rows=num_rows, **others)
    pool = arrays.pop("pages_pkbd")
    attend = functools.partial(ragged_paged_attention, **options, impl="gpu")
    jitted = jax.jit(lambda pool, rest: attend(pages_pkbd=pool, **rest), donate_argnums=0)
    return compile_for("h100", jitted, pool, arrays), math.prod(pool.shape) * pool.dtype.itemsize


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model", SHAPES)
def test_compiles_for_hopper(model: str, rows: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    compiled, pool_bytes = compile_attention(SHAPES[model], rows)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 2, "the pool is copied"
    assert not re.findall(r"= \w+\[4093,[\d,]+\]\S* copy\(", compiled.as_text())
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", "".join(capfd.readouterr()))]
    assert (model, rows) in SPILLS or not any(spills)


@pytest.mark.parametrize("page_size", [8, 16, 64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compiles_for_every_page_size(page_size: int, dtype: str):
    compile_attention(MODELS["llama-3-8b"], "mixed", page_size=page_size, dtype=jnp.dtype(dtype))


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 192, 256])
def test_few_long_rows_compile_in_parts(head_size: int):
    """Their sums in float32 share the processor's memory with the buffers."""
    shape = ModelShape(num_heads=8, num_kv_heads=2, head_size=head_size)
    compile_attention(shape, "few", table_width=1024)


def test_is_the_kernel_taken_without_asking_for_it():
    """In a process of its own: which backend runs is decided by the chip that is compiled for."""
    code = """
import jax
from jaxserve.pallas_kernels.ahead_of_time import compile_for
from jaxserve.pallas_kernels.ragged_paged_attention.cases import MODELS, shapes_of
from jaxserve.pallas_kernels.ragged_paged_attention.op import ragged_paged_attention
arrays, options = shapes_of(MODELS["llama-3-8b"], num_tokens=64, num_rows=64)
print(compile_for("h100", jax.jit(lambda a: ragged_paged_attention(**a, **options)), arrays).as_text())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert "mosaic_gpu" in done.stdout
