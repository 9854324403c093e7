"""The engine's whole step on a mesh, in shapes: what is jitted, and what it is called with."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.executor.inputs import StepInputs, empty_inputs
from jaxserve.executor.ladder import Rung
from jaxserve.executor.program import DeviceState, jit_step, shardings
from jaxserve.models import weights
from jaxserve.models.config import ModelConfig
from jaxserve.models.kv import empty_pages
from jaxserve.models.registry import family_of
from jaxserve.models.spec import is_spec, leaves
from jaxserve.sampling.sampler import empty_state
from jaxserve.sharding.mesh import Parallel
from jaxserve.sharding.rules import partition

BLOCK_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted step and the shapes of its arguments, which say how they lie on the mesh."""

    jitted: Any
    params: Any
    state: DeviceState
    inputs: StepInputs[jax.ShapeDtypeStruct]

    @property
    def args(self) -> tuple[Any, ...]:
        """For `jitted.lower(*args)`; no expert is held twice."""
        return self.params, self.state, self.inputs, None


def make_step(
    cfg: ModelConfig, parallel: Parallel, mesh: Mesh, rung: Rung, num_blocks: int, dtype: jnp.dtype, table_width: int
) -> Step:
    """The step of one rung. `num_blocks`: of each replica."""
    family, replicas = family_of(cfg), parallel.data
    params = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=weights.sharding_of(spec, mesh)),
        family.abstract(cfg),
        is_leaf=is_spec,
    )
    vocab_size, num_slots = cfg.vocab_size + cfg.vocab_padding, replicas * rung.rows
    state = jax.eval_shape(
        lambda: DeviceState(
            empty_pages(cfg, replicas * num_blocks, BLOCK_SIZE, dtype), empty_state(num_slots, vocab_size)
        )
    )
    jitted = jit_step(family, cfg, None, params, state, mesh)
    state = jax.tree.map(
        lambda x, lies: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lies), state, shardings(state, mesh)
    )
    sizes = {"table_width": table_width, "num_slots": rung.rows, "vocab_size": cfg.vocab_size}
    inputs = empty_inputs(rung, **sizes, num_replicas=replicas)
    rows, same = NamedSharding(mesh, partition(["replica"])), NamedSharding(mesh, PartitionSpec())
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows if x.ndim else same), inputs)
    return Step(jitted, params, state, inputs)


def smallest_matrix_bytes(specs: Any, parallel: Parallel, dtype: jnp.dtype) -> int:
    """What a device holds of the smallest matrix; of the smallest that is split, if any is."""
    matrices = [spec for spec in leaves(specs) if spec.fan_in and len(spec.shape) > 1]
    split = [spec for spec in matrices if parallel.num_shards(*spec.axes) > 1]
    return min(spec.size // parallel.num_shards(*spec.axes) for spec in split or matrices) * dtype.itemsize
