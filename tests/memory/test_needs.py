"""What is planned against what is there: shapes exactly, a compiled step's own figures from above."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.executor.inputs import empty_inputs
from jaxserve.executor.ladder import Rung
from jaxserve.executor.program import DeviceState, jit_step, shardings
from jaxserve.memory.needs import Needs, needs_of
from jaxserve.models import weights
from jaxserve.models.config import ModelConfig, from_hf
from jaxserve.models.kv import block_bytes, empty_pages
from jaxserve.models.registry import family_of
from jaxserve.models.spec import is_spec
from jaxserve.sampling.sampler import empty_state
from jaxserve.sharding.mesh import Parallel, make_mesh
from tests.models import toy

# An odd vocabulary, which most meshes must pad, and fewer KV heads than devices, which must be repeated.
CONFIG = toy.CASES["qwen3"]["config"] | {
    "hidden_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "vocab_size": 1023,
}
ROWS, TOKENS, BLOCKS, BLOCK_SIZE = 8, 1024, 16, 64
MESHES = [
    Parallel(),
    Parallel(tensor=8),
    Parallel(sequence=2, tensor=4),
    Parallel(sequence=8),
    Parallel(data=2, expert=2, tensor=2),
]


def laid_out(parallel: Parallel, dtype: jnp.dtype, num_tokens: int = TOKENS) -> tuple[ModelConfig, Any, Any, Needs]:
    """The model as these devices share it, its weights and state as shapes, and what is planned for them."""
    cfg = from_hf(CONFIG).for_shards(parallel.num_shards("heads"), parallel.num_shards("pool_heads"))
    mesh, specs, replicas = make_mesh(parallel), family_of(cfg).abstract(cfg), parallel.data
    params = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=weights.sharding_of(spec, mesh)),
        specs,
        is_leaf=is_spec,
    )
    shapes = jax.eval_shape(
        lambda: DeviceState(
            empty_pages(cfg, replicas * BLOCKS, BLOCK_SIZE, dtype, as_bits=True),
            empty_state(replicas * ROWS, cfg.vocab_size + cfg.vocab_padding),
        )
    )
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings(shapes, mesh)
    )
    needs = needs_of(cfg, specs, parallel, dtype, num_tokens=num_tokens, num_rows=ROWS, num_slots=ROWS)
    return cfg, params, state, needs


def bytes_on_a_device(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("parallel", MESHES, ids=str)
def test_weights_state_and_pool_are_planned_to_the_byte(parallel: Parallel):
    dtype = jnp.dtype("bfloat16")
    cfg, params, state, needs = laid_out(parallel, dtype)
    assert bytes_on_a_device(params) == needs.weights
    assert bytes_on_a_device(state.sampler) == needs.sampler
    pool = BLOCKS * block_bytes(cfg, BLOCK_SIZE, dtype, "cpu") // parallel.num_shards("pool_heads")
    assert bytes_on_a_device(state.kv) == pool


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "dtype", "rung"),
    [
        (Parallel(), "float32", Rung(ROWS, ROWS, True)),
        (Parallel(tensor=8), "bfloat16", Rung(TOKENS, ROWS, False)),
        (Parallel(sequence=2, tensor=4), "float32", Rung(TOKENS, ROWS, False)),
        (Parallel(sequence=8), "float32", Rung(TOKENS, 1, False, "gather")),
    ],
    ids=str,
)
def test_a_step_needs_no_more_than_is_planned_and_not_far_less(parallel: Parallel, dtype: str, rung: Rung):
    """The figures are the compiler's for one of eight emulated devices."""
    cfg, params, state, needs = laid_out(parallel, jnp.dtype(dtype), num_tokens=rung.tokens)
    inputs = empty_inputs(rung, table_width=16, num_slots=ROWS, vocab_size=cfg.vocab_size)
    step = jit_step(family_of(cfg), cfg, "xla", params, state, make_mesh(parallel))
    memory = step.lower(params, state, inputs).compile().memory_analysis()

    planned = needs.weights + needs.sampler + bytes_on_a_device(state.kv)
    beside = memory.argument_size_in_bytes - planned
    assert 0 <= beside < 100_000, "arguments besides weights, sampler and pool: only the step's own inputs"
    assert needs.activations / 4 < memory.temp_size_in_bytes < needs.activations
