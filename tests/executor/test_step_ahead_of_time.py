"""The whole step of real models, compiled for chips that are not here, with the pool that the engine would make."""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxserve.executor.inputs import empty_inputs
from jaxserve.executor.ladder import Rung
from jaxserve.executor.program import DeviceState, run_step
from jaxserve.memory.needs import needs_of
from jaxserve.models.config import from_hf
from jaxserve.models.kv import block_bytes, empty_pages
from jaxserve.models.published import MODELS
from jaxserve.models.registry import family_of
from jaxserve.models.spec import is_spec
from jaxserve.pallas_kernels.ahead_of_time import compile_for, has_compiler, has_gpu_compiler
from jaxserve.pallas_kernels.chips import CHIPS
from jaxserve.sampling.sampler import empty_state
from jaxserve.sharding.mesh import ONE_DEVICE

pytestmark = pytest.mark.usefixtures("optimized")
ON_TPU = [pytest.mark.slow, pytest.mark.skipif(not has_compiler(), reason="needs the libtpu package")]
ON_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not has_gpu_compiler(), reason="needs jax[cuda13]"),
    pytest.mark.filterwarnings("ignore"),  # the plugin's, that there is no GPU
]

ROWS, TOKENS, BLOCK_SIZE, TABLE = 64, 1024, 32, 128
UTILIZATION = 0.9  # the engine's default
DTYPE = jnp.dtype("bfloat16")


RUNGS = {"decode": Rung(ROWS, ROWS, True), "mixed": Rung(TOKENS, ROWS, False)}
# Each takes half a minute, most of it for the sampler; those with all layers take more.
CASES = [
    pytest.param("v5e", "qwen3-4b", "mixed", 2, marks=ON_TPU),
    pytest.param("v5p", "llama-3.1-8b", "decode", 2, marks=ON_TPU),
    pytest.param("v6e", "llama-3.1-8b", "decode", None, marks=ON_TPU),
    pytest.param("tpu7x", "llama-3.1-8b", "mixed", 2, marks=ON_TPU),
    pytest.param("h100", "llama-3.1-8b", "decode", None, marks=ON_GPU),
    pytest.param("h100", "llama-3.1-8b", "mixed", None, marks=ON_GPU),
]


@pytest.mark.parametrize(("chip", "model", "rung_name", "num_layers"), CASES)
def test_the_step_fits_with_the_pool_that_is_planned(chip: str, model: str, rung_name: str, num_layers: int | None):
    rung = RUNGS[rung_name]
    cfg = from_hf(MODELS[model] | ({"num_hidden_layers": num_layers} if num_layers else {}))
    family = family_of(cfg)
    specs = family.abstract(cfg)
    usable, kind = int(CHIPS[chip].hbm_bytes * UTILIZATION), CHIPS[chip].name
    needs = needs_of(cfg, specs, ONE_DEVICE, DTYPE, num_tokens=TOKENS, num_rows=ROWS, num_slots=ROWS, device_kind=kind)
    num_blocks = (usable - needs.total) // block_bytes(cfg, BLOCK_SIZE, DTYPE)
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, DTYPE), specs, is_leaf=is_spec)
    state = jax.eval_shape(
        lambda: DeviceState(empty_pages(cfg, num_blocks, BLOCK_SIZE, DTYPE), empty_state(ROWS, cfg.vocab_size))
    )
    inputs = empty_inputs(rung, table_width=TABLE, num_slots=ROWS, vocab_size=cfg.vocab_size)
    step = jax.jit(functools.partial(run_step, family, cfg, None), donate_argnums=1)

    memory = compile_for(chip, step, params, state, inputs).memory_analysis()

    assert memory.alias_size_in_bytes >= num_blocks * block_bytes(cfg, BLOCK_SIZE, DTYPE), "the pool is copied"
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < usable
    assert memory.temp_size_in_bytes < needs.activations, "a step needs more than is kept for it"
    if (chip, rung_name) != ("tpu7x", "decode"):  # the copy of the head that is kept for is made by mixed steps alone
        assert memory.temp_size_in_bytes + needs.sampler > needs.activations / 4, "far more is kept than a step needs"
