"""What devices tell each other in a step: two sums of the tokens' activations per layer, a few numbers per row for sampling,
and never a weight or the pool."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from slices import cases, step, traffic

from jaxserve.executor.ladder import Rung
from jaxserve.models import llama
from jaxserve.models.config import ModelConfig, dense_from_hf
from jaxserve.pallas_kernels.ahead_of_time import compile_on, has_compiler, hbm_bytes, slice_devices
from jaxserve.request import MAX_LOGPROBS
from jaxserve.sharding.collectives import gather
from jaxserve.sharding.hlo import Collective, collectives, totals
from jaxserve.sharding.mesh import Parallel, make_mesh

F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "intermediate_size": 512,
    "vocab_size": 1024,
    "max_position_embeddings": 256,
}
EMBED, LAYERS = TINY["hidden_size"], TINY["num_hidden_layers"]
DECODE, MIXED = Rung(8, 8, True), Rung(32, 4, False)
TENSOR_2 = Parallel(tensor=2)


def make(parallel: Parallel, rung: Rung) -> tuple[ModelConfig, step.Step]:
    cfg = step.laid_out(dense_from_hf(TINY), parallel)
    return cfg, step.make_step(cfg, parallel, make_mesh(parallel), rung, num_blocks=256, dtype=F32, table_width=8)


def found_in(jitted, *args) -> list[Collective]:
    """All collectives between at least two devices."""
    found = collectives(jitted.lower(*args).compile().as_text())
    return [one for one in found if one.group_size > 1]


@functools.cache
def found_on(parallel: Parallel, rung: Rung) -> list[Collective]:
    _, made = make(parallel, rung)
    return found_in(made.jitted, *made.args)


def kinds(found: list[Collective]) -> dict[str, int]:
    return {kind: count for kind, (count, _) in totals(found).items()}


def limit(parallel: Parallel) -> int:
    """What a device has of the smallest matrix; its part of the pool is larger."""
    cfg, made = make(parallel, DECODE)
    smallest = step.smallest_matrix_bytes(cfg, parallel, F32)
    assert smallest < made.state.kv.pages_pkbd.size * F32.itemsize / parallel.num_devices
    return smallest


@pytest.mark.parametrize(
    "parallel",
    [TENSOR_2, Parallel(tensor=4), Parallel(tensor=8), Parallel(expert=2), Parallel(data=2, expert=2, tensor=2)],
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


def test_nothing_crosses_replicas():
    assert found_on(Parallel(data=2), DECODE) == []


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


@pytest.mark.parametrize("rung", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("parallel", [TENSOR_2, Parallel(tensor=8), Parallel(sequence=2, expert=2, tensor=2)], ids=str)
def test_no_weight_and_no_pool_is_handed_on(parallel: Parallel, rung: Rung):
    found = found_on(parallel, rung)
    assert traffic.moved_arrays(found, limit(parallel)) == []
    assert max(one.result_bytes for one in found) < limit(parallel), "not by a sum either"


def test_a_weight_that_lies_otherwise_than_the_step_wants_it_is_seen():
    _, made = make(TENSOR_2, DECODE)
    layer, *others = made.params.layers
    mesh = layer.mlp.down_ef.sharding.mesh
    assert layer.mlp.down_ef.sharding.spec == PartitionSpec(None, ("expert", "tensor"))
    by_rows = NamedSharding(mesh, PartitionSpec("tensor", None))
    moved = jax.ShapeDtypeStruct(layer.mlp.down_ef.shape, F32, sharding=by_rows)
    layer = dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, down_ef=moved))
    params = dataclasses.replace(made.params, layers=(layer, *others))
    found = found_in(made.jitted, params, made.state, made.inputs)
    assert traffic.moved_arrays(found, limit(TENSOR_2))


def test_a_pool_that_lies_otherwise_is_seen():
    _, made = make(TENSOR_2, DECODE)
    pool = made.state.kv.pages_pkbd
    by_pages = NamedSharding(pool.sharding.mesh, PartitionSpec("tensor"))
    kv = dataclasses.replace(made.state.kv, pages_pkbd=jax.ShapeDtypeStruct(pool.shape, F32, sharding=by_pages))
    found = found_in(made.jitted, made.params, made.state._replace(kv=kv), made.inputs)
    assert traffic.moved_arrays(found, limit(TENSOR_2))


def test_a_model_that_gathers_a_weight_is_seen(monkeypatch):
    def gathers(ids_t, table_ve):
        return jnp.take(gather("vocab", table_ve, axis=0), ids_t, axis=0)

    monkeypatch.setattr(llama, "embed", gathers)
    _, made = make(TENSOR_2, DECODE)
    (one,) = traffic.moved_arrays(found_in(made.jitted, *made.args), limit(TENSOR_2))
    assert (one.kind, one.result_bytes) == ("all-gather", TINY["vocab_size"] * EMBED * F32.itemsize)
