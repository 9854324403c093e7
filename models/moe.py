"""A mixture of experts: every token is given to the few experts that its router likes best (arXiv 2101.03961, 2401.04088).

All devices along `expert` and `tensor` have the same tokens. Each computes what its own experts, or its part of them, make
of the tokens that they are given, and one sum over both axes puts it together. No token is ever dropped.
"""

import dataclasses
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from jaxserve.models import mlp
from jaxserve.models.config import Experts, ModelConfig
from jaxserve.models.mlp import Mlp
from jaxserve.models.spec import Part, WeightSpec
from jaxserve.pallas_kernels.grouped_matmul.op import grouped_matmul
from jaxserve.pallas_kernels.matmul.op import matmul
from jaxserve.sharding.collectives import sum_over, to_local

T = TypeVar("T")  # what the tree holds: jax.Array, WeightSpec, a sharding, ...


@struct.dataclass
class Moe(Generic[T]):
    """Weights `[out, in]`. A slot s holds the weights of one expert x; without redundancy slot i holds those of expert i."""

    router_xe: T
    gate_up_scfe: T  # c = 2: gate, up
    down_sef: T
    shared: Mlp[T] | None  # the expert that every token is given to
    shared_gate_1e: T | None


@struct.dataclass
class Placement(Generic[T]):
    """Where each layer's experts are; made by `sharding.balance`. Its shapes stay when experts move, so nothing compiles."""

    slots_lxc: T  # i32, the slots that hold an expert; entries past its copies may hold any slot
    copies_lx: T  # i32, how many they are, at least 1


class Routes(NamedTuple):
    """The experts that each token is given to, the best first, and what their results are multiplied with."""

    expert_tk: Int[Array, "t k"]
    weight_tk: Float[Array, "t k"]  # float32


def feed_forward(
    moe: Moe[jax.Array],
    experts: Experts,
    x_te: Float[Array, "t e"],
    is_real_t: Bool[Array, " t"],
    placement: Placement[jax.Array] | None = None,
    layer: int = 0,
) -> tuple[Float[Array, "t e"], Int[Array, " x"]]:
    """The weighted sum of what each token's experts make of it.

    Args:
      is_real_t: which tokens are none of padding; the others are given to no expert.
      placement: where experts are held, if some are held more than once.
      layer: of `placement`.

    Returns: the sums, and how many tokens each expert was given, over all devices that have these tokens.
    """
    routes = route(moe, experts, x_te)
    counts_x = _count(jnp.where(is_real_t[:, None], routes.expert_tk, experts.count), experts.count)
    slot_tk = routes.expert_tk if placement is None else _slots(routes.expert_tk, placement, layer)
    y_te = _routed(moe, x_te, slot_tk, routes.weight_tk, is_real_t)
    if moe.shared is not None and moe.shared_gate_1e is not None:
        gate_t1 = jax.nn.sigmoid(matmul(x_te, moe.shared_gate_1e))
        y_te = y_te + gate_t1 * matmul(mlp.gated(moe.shared, x_te), moe.shared.down_ef)
    return sum_over("ffn", y_te.astype(x_te.dtype)), counts_x


def route(moe: Moe[jax.Array], experts: Experts, x_te: Float[Array, "t e"]) -> Routes:
    """Choose experts by the softmax of all router logits, in float32; of equals the first."""
    probability_tx = jax.nn.softmax(matmul(x_te, moe.router_xe), axis=-1)
    weight_tk, expert_tk = jax.lax.top_k(probability_tx, experts.per_token)
    if experts.sums_to_one:
        weight_tk = weight_tk / jnp.sum(weight_tk, axis=-1, keepdims=True)
    return Routes(expert_tk, weight_tk)


def _slots(expert_tk: Int[Array, "t k"], placement: Placement[jax.Array], layer: int) -> Int[Array, "t k"]:
    """A slot of each expert: its copies take turns along the tokens."""
    turn_t1 = jnp.arange(expert_tk.shape[0], dtype=jnp.int32)[:, None] + layer
    copy_tk = jax.lax.rem(turn_t1, placement.copies_lx[layer, expert_tk])
    return placement.slots_lxc[layer, expert_tk, copy_tk]


def _routed(
    moe: Moe[jax.Array],
    x_te: Float[Array, "t e"],
    slot_tk: Int[Array, "t k"],
    weight_tk: Float[Array, "t k"],
    is_real_t: Bool[Array, " t"],
) -> Float[Array, "t e"]:
    """What this device's slots add to each token, float32. Tokens are copied once for each of their experts, in the order
    of slots; what is for other devices, and padding, comes last and belongs to no group."""
    (num_tokens, per_token), (num_slots, _, ffn, embed_size) = slot_tk.shape, moe.gate_up_scfe.shape
    local_tk = jnp.asarray(to_local("experts", slot_tk, num_slots))
    is_mine_tk = (local_tk < num_slots) & is_real_t[:, None]
    local_m = jnp.where(is_mine_tk, local_tk, num_slots).reshape(-1)
    order_m = jnp.argsort(local_m)
    sizes_s = _count(local_m, num_slots)
    x_me = x_te[order_m // per_token]
    gate_up_mf = grouped_matmul(x_me, moe.gate_up_scfe.reshape(num_slots, 2 * ffn, embed_size), sizes_s, x_te.dtype)
    gate_mf, up_mf = jnp.split(gate_up_mf, 2, axis=-1)
    gated_mf = jax.nn.silu(gate_mf.astype(jnp.float32)).astype(x_te.dtype) * up_mf
    y_me = grouped_matmul(gated_mf, moe.down_sef, sizes_s, x_te.dtype)
    place_m = jnp.zeros_like(order_m).at[order_m].set(jnp.arange(len(order_m)), unique_indices=True)
    y_tke = y_me[place_m].reshape(num_tokens, per_token, embed_size)
    # Not a product with zero: rows of no group may be anything.
    return jnp.sum(jnp.where(is_mine_tk[:, :, None], weight_tk[:, :, None] * y_tke.astype(jnp.float32), 0), axis=1)


def _count(numbers: Int[Array, "*shape"], length: int) -> Int[Array, " length"]:
    """How often each number below `length` occurs. By comparison, because TPUs are slow at scattering into few places."""
    return jnp.sum(numbers.reshape(-1, 1) == jnp.arange(length, dtype=jnp.int32)[None, :], axis=0, dtype=jnp.int32)


def repacked(moe: Moe[jax.Array], source_s: Int[Array, " s"]) -> Moe[jax.Array]:
    """The same experts in other slots: each takes what slot `source_s[s]` (counted over all devices) held. One expert's
    weights cross devices at a time, so no device needs room for more than its slots twice and one."""

    def moved(weights: jax.Array) -> jax.Array:
        size = weights.shape[0]

        def take(slot: jax.Array, slots: jax.Array) -> jax.Array:
            source = to_local("experts", source_s[slot], size)
            held = jnp.where(source < size, weights[jnp.minimum(source, size - 1)], 0)
            return slots.at[to_local("experts", slot, size)].set(sum_over("experts", held), mode="drop")

        def take_other(slot: jax.Array, slots: jax.Array) -> jax.Array:
            return jax.lax.cond(source_s[slot] == slot, lambda _, slots: slots, take, slot, slots)

        return jax.lax.fori_loop(0, source_s.shape[0], take_other, weights)

    return dataclasses.replace(moe, gate_up_scfe=moved(moe.gate_up_scfe), down_sef=moved(moe.down_sef))


class _Names(NamedTuple):
    """What tensors are called in a checkpoint."""

    block: str
    gate: str
    up: str
    down: str


_QWEN = _Names("mlp.", "gate_proj", "up_proj", "down_proj")
_NAMES = {"MixtralForCausalLM": _Names("block_sparse_moe.", "w1", "w3", "w2")}


def abstract(cfg: ModelConfig, experts: Experts, prefix: str) -> Moe[WeightSpec]:
    """The weights of one layer as specs; `prefix` is the layer's, final dot included. Slots hold experts in turn."""
    e, f, names = cfg.embed_size, experts.ffn_size, _NAMES.get(cfg.architecture, _QWEN)
    block = prefix + names.block
    held = [(slot, f"{block}experts.{slot % experts.count}.") for slot in range(experts.num_slots)]
    both = ((0, names.gate), (1, names.up))
    gates_ups = [Part(name=f"{name}{part}.weight", where=(slot, c)) for slot, name in held for c, part in both]
    downs = [Part(name=f"{name}{names.down}.weight", where=(slot,)) for slot, name in held]

    def vectors(name: str, count: int) -> WeightSpec:
        return WeightSpec(shape=(count, e), axes=(None, "embed"), parts=(Part(name=block + name),), fan_in=e)

    shared = experts.shared_ffn_size
    return Moe(
        router_xe=vectors("gate.weight", experts.count),
        gate_up_scfe=WeightSpec(
            shape=(experts.num_slots, 2, f, e),
            axes=("experts", None, "expert_ffn", "embed"),
            parts=tuple(gates_ups),
            fan_in=e,
        ),
        down_sef=WeightSpec(
            shape=(experts.num_slots, e, f), axes=("experts", "embed", "expert_ffn"), parts=tuple(downs), fan_in=f
        ),
        shared=mlp.abstract(f"{block}shared_expert.", e, shared) if shared else None,
        shared_gate_1e=vectors("shared_expert_gate.weight", 1) if shared else None,
    )
