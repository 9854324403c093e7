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
from jaxserve.models.registry import family_of
from jaxserve.models.spec import is_spec
from jaxserve.pallas_kernels.ahead_of_time import compile_for, has_compiler, has_gpu_compiler
from jaxserve.pallas_kernels.chips import CHIPS
from jaxserve.sampling.sampler import empty_state
from jaxserve.sharding.mesh import ONE_DEVICE

ON_TPU = [pytest.mark.slow, pytest.mark.skipif(not has_compiler(), reason="needs the libtpu package")]
ON_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not has_gpu_compiler(), reason="needs jax[cuda13]"),
    pytest.mark.filterwarnings("ignore"),  # the plugin's, that there is no GPU
]

MODELS = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
    },
    "qwen3-4b": {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
    },
}
ROWS, TOKENS, BLOCK_SIZE, TABLE = 64, 1024, 32, 128
UTILIZATION = 0.9  # the engine's default
DTYPE = jnp.dtype("bfloat16")


RUNGS = {"decode": Rung(ROWS, ROWS, True), "mixed": Rung(TOKENS, ROWS, False)}
CASES = [
    pytest.param(chip, model, rung, marks=ON_GPU if chip == "h100" else ON_TPU)
    for chip, model in (
        ("v5e", "qwen3-4b"),
        ("v5p", "llama-3.1-8b"),
        ("v6e", "llama-3.1-8b"),
        ("tpu7x", "llama-3.1-8b"),
        ("h100", "llama-3.1-8b"),
    )
    for rung in RUNGS
]


@pytest.mark.parametrize(("chip", "model", "rung_name"), CASES)
def test_the_step_fits_with_the_pool_that_is_planned(chip: str, model: str, rung_name: str):
    rung = RUNGS[rung_name]
    cfg = from_hf(MODELS[model])
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
