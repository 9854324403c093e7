"""What devices tell each other in a step: two sums of the tokens' activations per layer, a few numbers per row for sampling,
and never a weight or the pool."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from slices import step, traffic

from jaxserve.config import EngineConfig
from jaxserve.executor.ladder import Rung
from jaxserve.memory.plan import lay_out
from jaxserve.memory.room import of_chip
from jaxserve.models import llama
from jaxserve.models.config import from_hf
from jaxserve.models.kv import block_bytes
from jaxserve.models.published import MODELS
from jaxserve.models.registry import family_of
from jaxserve.pallas_kernels.ahead_of_time import compile_on, has_compiler, slice_devices
from jaxserve.request import MAX_LOGPROBS
from jaxserve.sharding.collectives import gather
from jaxserve.sharding.hlo import Collective, collectives, totals
from jaxserve.sharding.mesh import Parallel, make_mesh

F32 = jnp.dtype("float32")
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "intermediate_size": 512,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
}
EXPERTS = TINY | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}
EMBED, LAYERS = TINY["hidden_size"], TINY["num_hidden_layers"]
DECODE, MIXED = Rung(8, 8, True), Rung(16, 4, False)
TENSOR_2 = Parallel(tensor=2)


def make(parallel: Parallel, rung: Rung, config: dict[str, Any] = TINY) -> step.Step:
    shards = (parallel.num_shards(axis) for axis in ("heads", "pool_heads", "experts"))
    cfg = from_hf(config).for_shards(*shards)
    return step.make_step(cfg, parallel, make_mesh(parallel), rung, num_blocks=256, dtype=F32, table_width=8)


def found_in(jitted, *args) -> list[Collective]:
    """All collectives between at least two devices."""
    found = collectives(jitted.lower(*args).compile().as_text())
    return [one for one in found if one.group_size > 1]


@functools.cache
def found_on(parallel: Parallel, rung: Rung) -> list[Collective]:
    made = make(parallel, rung)
    return found_in(made.jitted, *made.args)


def kinds(found: list[Collective]) -> dict[str, int]:
    return {kind: count for kind, (count, _) in totals(found).items()}


def limit(parallel: Parallel) -> int:
    """What a device has of the smallest matrix; its part of the pool is larger."""
    cfg = from_hf(TINY)
    smallest = step.smallest_matrix_bytes(family_of(cfg).abstract(cfg), parallel, F32)
    assert smallest < 256 * block_bytes(cfg, step.BLOCK_SIZE, F32) // parallel.num_devices
    return smallest


@pytest.mark.parametrize(
    "parallel",
    [
        TENSOR_2,
        pytest.param(Parallel(data=2, expert=2, tensor=2), marks=pytest.mark.slow),
        pytest.param(Parallel(tensor=4), marks=pytest.mark.slow),
        pytest.param(Parallel(tensor=8), marks=pytest.mark.slow),
        pytest.param(Parallel(expert=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_layer_sums_twice(parallel: Parallel):
    """8 tokens of 256 float32 numbers: 8 KB each time, of which a device sends 2 (n - 1) / n."""
    parts = traffic.by_part(found_on(parallel, DECODE))
    activations, shards = DECODE.tokens * EMBED * F32.itemsize, parallel.num_devices // parallel.data
    for index in range(LAYERS):
        layer = parts.pop(f"layer{index}")
        assert kinds(layer) == {"all-reduce": 2}
        assert [one.result_bytes for one in layer] == [activations] * 2
        assert [one.sent_bytes for one in layer] == [2 * activations * (shards - 1) // shards] * 2
        assert {one.group_size for one in layer} == {shards}
    assert [one.result_bytes for one in parts.pop("embed")] == [activations]
    assert set(parts) == {"sample", "prompt_logprobs"}
    likeliest = DECODE.rows * MAX_LOGPROBS * shards * F32.itemsize
    assert max(one.result_bytes for part in parts.values() for one in part) == likeliest


@pytest.mark.slow
def test_a_layer_of_experts_sums_twice():
    """No token travels to its experts: all devices of both axes have it, and sum what their experts make of it."""
    made = make(Parallel(expert=2, tensor=2), DECODE, EXPERTS)
    found = found_in(made.jitted, *made.args)
    parts = traffic.by_part(found)
    for index in range(LAYERS):
        layer = parts[f"layer{index}"]
        assert kinds(layer) == {"all-reduce": 2}
        assert [one.result_bytes for one in layer] == [DECODE.tokens * EMBED * F32.itemsize] * 2
        assert {one.group_size for one in layer} == {4}
    an_expert = 128 // 2 * EMBED * F32.itemsize
    assert traffic.moved_arrays(found, an_expert) == []


@pytest.mark.slow
def test_nothing_crosses_replicas():
    assert found_on(Parallel(data=2), DECODE) == []


@pytest.mark.slow
def test_devices_that_share_tokens_exchange_heads_twice():
    """Queries, keys and values go out, results come back; the last token of each row is told to all."""
    parts = traffic.by_part(found_on(Parallel(sequence=2), DECODE))
    heads = DECODE.tokens * EMBED * F32.itemsize // 2
    for index in range(LAYERS):
        layer = parts[f"layer{index}"]
        assert kinds(layer) == {"all-to-all": 2}
        assert sorted(one.result_bytes for one in layer) == [heads, 3 * heads]


def test_all_axes_together():
    """Half of the tokens are summed, because two devices share them."""
    parts = traffic.by_part(found_on(Parallel(sequence=2, expert=2, tensor=2), DECODE))
    for index in range(LAYERS):
        layer = parts[f"layer{index}"]
        assert kinds(layer) == {"all-to-all": 2, "all-reduce": 2}
        sums = [one for one in layer if one.kind == "all-reduce"]
        assert [one.result_bytes for one in sums] == [DECODE.tokens // 2 * EMBED * F32.itemsize] * 2
        assert {one.group_size for one in sums} == {4}


def test_the_last_layer_of_a_mixed_step_sums_for_ends_or_for_all():
    """Two branches, of which a step takes one."""
    parts = traffic.by_part(found_on(TENSOR_2, MIXED))
    row = EMBED * F32.itemsize
    for index in range(LAYERS - 1):
        assert [one.result_bytes for one in parts[f"layer{index}"]] == [MIXED.tokens * row] * 2
    last = sorted(one.result_bytes for one in parts[f"layer{LAYERS - 1}"])
    assert last == [MIXED.rows * row] * 2 + [MIXED.tokens * row] * 2


@pytest.mark.parametrize(
    ("parallel", "rung"),
    [
        (TENSOR_2, DECODE),
        (TENSOR_2, MIXED),
        (Parallel(sequence=2, expert=2, tensor=2), DECODE),
        pytest.param(Parallel(tensor=8), DECODE, marks=pytest.mark.slow),
        pytest.param(Parallel(sequence=2, expert=2, tensor=2), MIXED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_weight_and_no_pool_is_handed_on(parallel: Parallel, rung: Rung):
    found = found_on(parallel, rung)
    assert traffic.moved_arrays(found, limit(parallel)) == []
    assert max(one.result_bytes for one in found) < limit(parallel), "not by a sum either"


def test_arrays_that_lie_otherwise_than_the_step_wants_them_are_seen():
    """A weight split by rows, not by columns, and a pool split by pages, not by heads: XLA moves them in every step."""
    made = make(TENSOR_2, DECODE)
    (layer, *others), pool = made.params.layers, made.state.kv.pages_pkbd
    down, by_rows = layer.mlp.down_ef, PartitionSpec("tensor")
    assert by_rows not in (down.sharding.spec, pool.sharding.spec)
    down, pool = (
        jax.ShapeDtypeStruct(x.shape, F32, sharding=NamedSharding(x.sharding.mesh, by_rows)) for x in (down, pool)
    )
    layer = dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, down_ef=down))
    params = dataclasses.replace(made.params, layers=(layer, *others))
    state = made.state._replace(kv=dataclasses.replace(made.state.kv, pages_pkbd=pool))
    made = dataclasses.replace(made, params=params, state=state)
    moved = traffic.moved_arrays(found_in(made.jitted, *made.args), limit(TENSOR_2))
    sizes = {one.result_bytes for one in moved}
    assert {down.size * F32.itemsize // 2, pool.size * F32.itemsize // 2} <= sizes


@pytest.mark.slow
def test_a_model_that_gathers_a_weight_is_seen(monkeypatch):
    def gathers(ids_t, table_ve):
        return jnp.take(gather("vocab", table_ve, axis=0), ids_t, axis=0)

    monkeypatch.setattr(llama, "embed", gathers)
    made = make(TENSOR_2, DECODE)
    (one,) = traffic.moved_arrays(found_in(made.jitted, *made.args), limit(TENSOR_2))
    assert (one.kind, one.result_bytes) == ("all-gather", TINY["vocab_size"] * EMBED * F32.itemsize)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs the libtpu package")
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("rung", [Rung(64, 64, True), Rung(1024, 64, False)], ids=["decode", "mixed"])
def test_two_layers_of_llama_8b_on_four_v5e(rung: Rung):
    """By the TPU compiler: all of it fits with the pool that is planned, our kernels run, and no array is handed on."""
    config = EngineConfig(max_num_seqs=64, max_num_batched_tokens=1024, max_model_len=8192)
    parallel = Parallel(tensor=4)
    plan = lay_out(config, from_hf(MODELS["llama-3.1-8b"] | {"num_hidden_layers": 2}), of_chip("v5e", 4), parallel)
    mesh = make_mesh(parallel, slice_devices("v5e:2x2"))
    made = step.make_step(plan.cfg, parallel, mesh, rung, plan.num_blocks, plan.dtype, 8192 // plan.block_size)

    program = compile_on(mesh, made.jitted, *made.args)

    found, memory = collectives(program.text), program.compiled.memory_analysis()
    assert 'custom_call_target="tpu_custom_call"' in program.text
    assert memory.alias_size_in_bytes >= plan.pool_bytes, "the pool is copied"
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < plan.usable_bytes
    assert memory.temp_size_in_bytes < plan.needs.activations
    assert traffic.moved_arrays(found, step.smallest_matrix_bytes(plan.specs, parallel, plan.dtype)) == []
    parts, activations = traffic.by_part(found), rung.tokens * plan.cfg.embed_size * plan.dtype.itemsize
    assert kinds(parts["layer0"]) == {"all-reduce": 2}  # the last one of a mixed step has two branches
    assert [one.result_bytes for one in parts["layer0"]] == [activations] * 2
