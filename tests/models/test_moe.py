"""Experts on one device and on many, against a dense computation of every expert with every token in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.executor.compiles import count_compiles
from jaxserve.models import llama, moe, spec, weights
from jaxserve.models.batch import TokenBatch
from jaxserve.models.config import Experts, ModelConfig, from_hf
from jaxserve.models.kv import empty_pages
from jaxserve.models.moe import Moe, Placement
from jaxserve.sharding import balance
from jaxserve.sharding.mesh import Parallel, make_mesh
from jaxserve.sharding.rules import partition
from tests.models import toy

TOKENS, REAL = 21, 17  # the last four are padding
MESHES = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 8), (2, 2), (2, 4), (4, 2)]  # devices along expert and tensor


def config(*, per_token: int = 3, sums_to_one: bool = True, shared: bool = True, num_slots: int = 8) -> ModelConfig:
    """Of a Qwen2-MoE with 8 experts; 16 columns in each, 24 in the shared one."""
    cfg = from_hf(toy.CASES["qwen2_moe"]["config"])
    assert cfg.experts is not None
    changes = {"per_token": per_token, "sums_to_one": sums_to_one, "num_slots": num_slots, "ffn_size": 16}
    experts = dataclasses.replace(cfg.experts, shared_ffn_size=24 if shared else 0, **changes)
    return dataclasses.replace(cfg, embed_size=32, experts=experts)


def specs_of(cfg: ModelConfig) -> Moe[Any]:
    assert cfg.experts is not None
    return moe.abstract(cfg, cfg.experts, "model.layers.0.")


def make_inputs(cfg: ModelConfig, seed: int = 0) -> tuple[Moe[np.ndarray], np.ndarray]:
    """Weights, and tokens with NaN where they are padding."""
    rng = np.random.default_rng(seed)

    def draw(s: spec.WeightSpec) -> np.ndarray:
        return (2 * s.fan_in**-0.5 * rng.standard_normal(s.shape)).astype(np.float32)

    params = jax.tree.map(draw, specs_of(cfg), is_leaf=spec.is_spec)
    x_te = rng.standard_normal((TOKENS, cfg.embed_size)).astype(np.float32)
    x_te[REAL:] = np.nan
    return params, x_te


def dense(params: Moe[np.ndarray], experts: Experts, x_te: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The formula, and the tokens that each expert was given."""

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    wide = jax.tree.map(lambda a: a.astype(np.float64), params)
    logits_tx = x_te @ wide.router_xe.T
    probability_tx = np.exp(logits_tx) / np.exp(logits_tx).sum(axis=1, keepdims=True)
    y_te, counts_x = np.zeros(x_te.shape), np.zeros(experts.count, np.int64)
    for t, x_e in enumerate(x_te.astype(np.float64)):
        chosen = np.argsort(-probability_tx[t], kind="stable")[: experts.per_token]
        total = probability_tx[t, chosen].sum() if experts.sums_to_one else 1
        for x in chosen:
            gate_f, up_f = wide.gate_up_scfe[x] @ x_e
            y_te[t] += probability_tx[t, x] / total * (wide.down_sef[x] @ (silu(gate_f) * up_f))
            counts_x[x] += 1
        if wide.shared is not None:
            gate_f, up_f = wide.shared.gate_up_cfe @ x_e
            share = 1 / (1 + np.exp(-(wide.shared_gate_1e @ x_e)))
            y_te[t] += share * (wide.shared.down_ef @ (silu(gate_f) * up_f))
    return y_te, counts_x


@functools.cache
def layer_on(cfg: ModelConfig, expert: int, tensor: int) -> Any:
    """The layer as it runs on a mesh: `f(params, x_te, placement)`."""
    mesh = make_mesh(Parallel(expert=expert, tensor=tensor))
    parts = jax.tree.map(lambda s: partition(s.axes), specs_of(cfg), is_leaf=spec.is_spec)

    def run(params: Moe[jax.Array], x_te: jax.Array, placement: Placement[jax.Array] | None) -> Any:
        assert cfg.experts is not None
        return moe.feed_forward(params, cfg.experts, x_te, jnp.arange(TOKENS) < REAL, placement)

    everywhere = PartitionSpec()
    specs = {"in_specs": (parts, everywhere, everywhere), "out_specs": everywhere}
    return jax.jit(jax.shard_map(run, mesh=mesh, check_vma=False, **specs))


def assert_equal(cfg: ModelConfig, mesh: tuple[int, int], params: Any, x_te: np.ndarray, placement: Any = None) -> None:
    assert cfg.experts is not None
    got_te, counts_x = layer_on(cfg, *mesh)(_in_slots(params, placement), x_te, placement)
    want_te, want_x = dense(params, cfg.experts, x_te[:REAL])
    np.testing.assert_allclose(np.asarray(got_te)[:REAL], want_te, rtol=0, atol=2e-5 * max(1, np.abs(want_te).max()))
    np.testing.assert_array_equal(counts_x, want_x)


def _in_slots(params: Moe[np.ndarray], placement: Any) -> Moe[np.ndarray]:
    """Weights by expert -> weights by slot."""
    if placement is None:
        return params
    expert_s = np.empty(placement.slots_lxc.max() + 1, np.int32)
    for x, slots in enumerate(placement.slots_lxc[0]):
        expert_s[slots] = x
    return dataclasses.replace(params, gate_up_scfe=params.gate_up_scfe[expert_s], down_sef=params.down_sef[expert_s])


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"expert {m[0]}, tensor {m[1]}")
def test_many_devices_equal_the_formula(mesh):
    cfg = config()
    assert_equal(cfg, mesh, *make_inputs(cfg))


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize(
    ("per_token", "sums_to_one", "shared"), [(1, True, False), (1, False, True), (8, False, False)]
)
def test_one_expert_per_token_and_all(per_token, sums_to_one, shared, mesh):
    cfg = config(per_token=per_token, sums_to_one=sums_to_one, shared=shared)
    assert_equal(cfg, mesh, *make_inputs(cfg))


@pytest.mark.parametrize("expert", [0, 5])
@pytest.mark.parametrize("mesh", [(1, 1), (4, 2)], ids=str)
def test_all_tokens_to_the_same_experts(mesh, expert):
    """Most experts, and all of some devices, have nothing to do."""
    cfg = config()
    params, x_te = make_inputs(cfg)
    x_te[:, 0] = 1
    x_te[REAL:] = np.nan
    params.router_xe[:, 0] = 100 * np.isin(np.arange(8), [expert, expert + 1, expert + 2])
    assert_equal(cfg, mesh, params, x_te)
    assert dense(params, config().experts, x_te[:REAL])[1].tolist().count(REAL) == 3


def test_of_equal_experts_the_first_are_chosen():
    cfg = config()
    params, x_te = make_inputs(cfg)
    params.router_xe[:] = params.router_xe[3]
    params.router_xe[6] += 1e-3 * np.sign(x_te[0])  # of the first token, expert 6 is the best

    def chosen(params: Moe[np.ndarray], num_tokens: int) -> list[list[int]]:
        assert cfg.experts is not None
        on_device = jax.tree.map(jnp.asarray, params)
        return moe.route(on_device, cfg.experts, jnp.asarray(x_te[:num_tokens])).expert_tk.tolist()

    assert chosen(params, 1) == [[6, 0, 1]]
    params.router_xe[:] = 0
    assert chosen(params, 2) == [[0, 1, 2]] * 2


def test_experts_held_twice_change_nothing():
    """Twelve slots on four devices. Plans are data: one program runs them all."""
    cfg = config(num_slots=12)
    params, x_te = make_inputs(config())
    plans = [balance.in_turn(1, 8, 12), *(balance.plan(load_1x, 12, 4) for load_1x in np.eye(8)[[0, 3, 7]][:, None])]
    compiles = []
    for plan in plans:
        assert_equal(cfg, (4, 1), params, x_te, Placement(plan.slots_lxc, plan.copies_lx))
        compiles.append(count_compiles())
    assert plans[1].copies_lx.max() == 5
    assert compiles == compiles[:1] * 4


def test_copies_take_turns():
    plan = balance.plan(np.array([[8.0, 1, 1, 1]]), 8, 4)
    placement = Placement(jnp.asarray(plan.slots_lxc), jnp.asarray(plan.copies_lx))
    slot_tk = np.asarray(moe._slots(jnp.zeros((10, 1), jnp.int32), placement, 0))
    assert np.bincount(slot_tk[:, 0], minlength=8)[plan.slots_lxc[0, 0]].tolist() == [2] * 5
    assert (plan.expert_ls[0, slot_tk] == 0).all()


def test_weights_are_loaded_into_all_slots(tmp_path):
    cfg = from_hf(toy.CASES["mixtral"]["config"])
    twice = dataclasses.replace(cfg, experts=dataclasses.replace(cfg.experts, num_slots=12))
    toy.write_case(tmp_path, "mixtral")
    once, held = (weights.load(tmp_path, llama.abstract(c), jnp.dtype("float32")) for c in (cfg, twice))
    for layer, other in zip(once.layers, held.layers, strict=True):
        expert_s = balance.in_turn(1, 8, 12).expert_ls[0]
        np.testing.assert_array_equal(layer.mlp.gate_up_scfe[expert_s], other.mlp.gate_up_scfe)
        np.testing.assert_array_equal(layer.mlp.down_sef[expert_s], other.mlp.down_sef)


def test_a_step_counts_the_tokens_of_each_expert(tmp_path):
    """Padding and empty rows are not counted; where only last tokens are needed, the last layer is given no other."""
    cfg = from_hf(toy.CASES["qwen2_moe"]["config"])
    toy.write_case(tmp_path, "qwen2_moe")
    params = weights.load(tmp_path, llama.abstract(cfg), jnp.dtype("float32"))
    batch = TokenBatch(
        ids_t=jnp.arange(16, dtype=jnp.int32),
        q_start_s=jnp.array([0, 5, 6, 6, 12], jnp.int32),
        kv_len_s=jnp.array([5, 1, 0, 6], jnp.int32),
        table_sm=jnp.arange(4, dtype=jnp.int32)[:, None],
    )

    @jax.jit
    def run(needs_all: jax.Array) -> llama.Forward:
        return llama.forward(params, cfg, batch, empty_pages(cfg, 4, 8, jnp.dtype("float32")), None, needs_all)

    every, ends = run(jnp.array(True)), run(jnp.array(False))
    assert every.counts_lx is not None
    assert ends.counts_lx is not None
    assert every.counts_lx.sum(axis=1).tolist() == [36, 0, 36]  # 12 tokens, 3 experts each; layer 1 is dense
    assert ends.counts_lx.sum(axis=1).tolist() == [36, 0, 9]
    np.testing.assert_allclose(ends.hidden_te[jnp.array([4, 5, 11])], every.hidden_te[jnp.array([4, 5, 11])], atol=1e-5)
