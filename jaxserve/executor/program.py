"""What runs on the devices: one step as a pure function, block copies, slot starts and masks, on one device or on a mesh.

On a mesh all of it runs under `jax.shard_map`: every device gets its part of weights, state and inputs, by the rules of
`sharding/rules.py`, and the functions called here say themselves what crosses devices.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.executor.inputs import StepInputs
from jaxserve.models.batch import last_tokens
from jaxserve.models.config import ModelConfig
from jaxserve.models.kv import BLOCKS_AXES, POOL_AXES, KVPages, copy_blocks, put_blocks, take_blocks
from jaxserve.models.moe import Moe, Placement, repacked
from jaxserve.models.registry import ModelFamily
from jaxserve.sampling import sampler
from jaxserve.sampling.sampler import STATE_AXES, Logprobs, SamplerState
from jaxserve.sharding.collectives import gather, take
from jaxserve.sharding.rules import partition

_FEW_ROWS = 4  # rows whose logits are computed alone when no later one samples
_REPLICA, _SAME = partition(["replica"]), PartitionSpec()  # a part for each replica, or the same for all


class DeviceState(NamedTuple):
    """What every step takes, changes in place and returns."""

    kv: KVPages[jax.Array]
    sampler: SamplerState[jax.Array]


@struct.dataclass
class StepOutputs:
    """What a step leaves on the device for the host to fetch."""

    token_s: jax.Array
    logprobs: Logprobs
    hidden_se: jax.Array  # last hidden state of each row
    prompt: Logprobs
    experts_1lx: jax.Array | None  # tokens that each expert of each layer was given; None: there are no experts


def jit_step(
    family: ModelFamily,
    cfg: ModelConfig,
    attention_backend: str | None,
    params: Any,
    state: DeviceState,
    mesh: Mesh | None,
) -> Any:
    """`run_step`, jitted. `params` (which lie on the mesh) and `state` may be shapes."""
    step = partial(run_step, family, cfg, attention_backend)
    if mesh is None:
        return jax.jit(step, donate_argnums=1)
    weights, states = jax.tree.map(lambda x: x.sharding.spec, params), specs(state)
    outputs = _REPLICA
    if mesh.is_multi_process:  # a host can read only what lies on its own devices
        step, outputs = _gathering(step), _SAME

    def on_mesh(
        params: Any, state: DeviceState, inputs: StepInputs[jax.Array], placement: Placement[jax.Array] | None = None
    ) -> tuple[StepOutputs, DeviceState]:
        rows = jax.tree.map(lambda x: _REPLICA if x.ndim else _SAME, inputs)
        over_mesh = _over(mesh, step, (weights, states, rows, _SAME), (outputs, states))
        return over_mesh(params, state, inputs, placement)

    return jax.jit(on_mesh, donate_argnums=1)


def _gathering(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step whose outputs are those of all replicas, on every device."""

    def gathering(*args: Any) -> Any:
        outputs, state = step(*args)
        return jax.tree.map(lambda x: gather("replica", x, axis=0), outputs), state

    return gathering


def jit_copy(state: DeviceState, mesh: Mesh | None) -> Any:
    """`models.kv.copy_blocks`, jitted; each replica has its own pairs of blocks."""
    kv = specs(state).kv
    return jax.jit(_over(mesh, copy_blocks, (kv, _REPLICA, _REPLICA), kv), donate_argnums=0)


def jit_take(state: DeviceState, mesh: Mesh | None) -> Any:
    """`models.kv.take_blocks`, jitted; each replica has its own list of blocks."""
    return jax.jit(_over(mesh, take_blocks, (specs(state).kv, _REPLICA), partition(BLOCKS_AXES)))


def jit_put(state: DeviceState, mesh: Mesh | None) -> Any:
    """`models.kv.put_blocks`, jitted."""
    kv = specs(state).kv
    return jax.jit(_over(mesh, put_blocks, (kv, partition(BLOCKS_AXES), _REPLICA), kv), donate_argnums=0)


def jit_start(state: DeviceState, mesh: Mesh | None) -> Any:
    """`sampler.start_slot`, jitted; slots are numbered through all replicas."""
    slots = specs(state).sampler
    return jax.jit(_over(mesh, sampler.start_slot, (slots, *(_SAME,) * 7), slots), donate_argnums=0)


def jit_masks(state: DeviceState, mesh: Mesh | None) -> Any:
    """`sampler.set_masks`, jitted; each replica has its own slots."""
    slots = specs(state).sampler
    return jax.jit(_over(mesh, sampler.set_masks, (slots, _REPLICA, _REPLICA), slots), donate_argnums=0)


def jit_repack(moe: Moe[jax.Array], mesh: Mesh | None) -> Any:
    """`models.moe.repacked`, jitted, for layers like this one."""
    weights = _SAME if mesh is None else jax.tree.map(lambda x: x.sharding.spec, moe)
    return jax.jit(_over(mesh, repacked, (weights, _SAME), weights))


def specs(state: DeviceState) -> Any:
    """How the state is split."""
    slots: Any = SamplerState(**{name: partition(axes) for name, axes in STATE_AXES.items()})
    return DeviceState(kv=jax.tree.map(lambda _: partition(POOL_AXES), state.kv), sampler=slots)


def shardings(state: DeviceState, mesh: Mesh | None) -> Any:
    """`specs` on a mesh; None: wherever JAX puts it."""
    return None if mesh is None else jax.tree.map(partial(NamedSharding, mesh), specs(state))


def _over(mesh: Mesh | None, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    if mesh is None:
        return function
    # Whether an output is the same on several devices is not checked: the checker knows few of our kernels.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def run_step(
    family: ModelFamily,
    cfg: ModelConfig,
    attention_backend: str | None,
    params: Any,
    state: DeviceState,
    inputs: StepInputs[jax.Array],
    placement: Placement[jax.Array] | None = None,
) -> tuple[StepOutputs, DeviceState]:
    """One step as a pure function: feed, forward, choose tokens, score prompts. Jitted once per rung.

    `placement`: where experts are held, if not in the slots of their numbers.
    """
    last_r = state.sampler.last_r
    fed_t = last_r[jnp.minimum(inputs.feed_t, last_r.shape[0] - 1)]
    ids_t = jnp.where(inputs.feed_t < last_r.shape[0], fed_t, inputs.batch.ids_t)
    batch = dataclasses.replace(inputs.batch, ids_t=ids_t)
    needs_all = inputs.num_wanted > 0
    hidden_te, kv, counts_lx = family.forward(params, cfg, batch, state.kv, attention_backend, needs_all, placement)
    hidden_se = take("tokens", hidden_te, last_tokens(batch))
    with jax.named_scope("sample"):
        samples_s = inputs.sampling.slot_s < last_r.shape[0]
        head = partial(family.logits, params, cfg)
        logits_sv = head(hidden_se) if batch.max_q_len == 1 else _logits(head, hidden_se, samples_s)
        token_s, logprobs, sampler_state = sampler.sample(logits_sv, state.sampler, inputs.sampling)
    with jax.named_scope("prompt_logprobs"):
        prompt = sampler.prompt_logprobs(head, hidden_te, inputs.wanted_t, inputs.target_t, inputs.num_wanted)
    outputs = StepOutputs(
        token_s=token_s,
        logprobs=logprobs,
        hidden_se=hidden_se.astype(jnp.float32),
        prompt=prompt,
        experts_1lx=None if counts_lx is None else counts_lx[None],
    )
    return outputs, DeviceState(kv=kv, sampler=sampler_state)


def _logits(head: Callable[[jax.Array], jax.Array], hidden_se: jax.Array, samples_s: jax.Array) -> jax.Array:
    """Logits of the rows that sample. A step that fills a prompt samples few, and the vocabulary is large."""
    num_rows = hidden_se.shape[0]
    if num_rows <= _FEW_ROWS:
        return head(hidden_se)

    def of_few(hidden_se: jax.Array) -> jax.Array:
        return jnp.pad(head(hidden_se[:_FEW_ROWS]), ((0, num_rows - _FEW_ROWS), (0, 0)))

    return jax.lax.cond(jnp.any(samples_s[_FEW_ROWS:]), head, of_few, hidden_se)
