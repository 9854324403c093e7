"""One attention call whose tokens are split over devices: what all schemes share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.sharding import block
from jaxserve.sharding.block import Mask
from jaxserve.sharding.collectives import shard_index
from jaxserve.sharding.layout import AXIS, Layout
from jaxserve.sharding.merge import Partial


class Call(NamedTuple):
    """What does not change while blocks travel. All but the mask's length is static."""

    layout: Layout
    mask: Mask
    scale: float
    num_steps: (
        int  # so many other devices' blocks a query may need: all, or those before it that a window reaches back to
    )

    @property
    def num_devices(self) -> int:
        """That share the tokens."""
        return self.layout.num_devices

    def attend(
        self,
        q_tnh: Float[Array, "t n h"],
        kv_2tkh: Float[Array, "2 c k h"],
        *,
        q_hop: Int[Array, ""] | int = 0,
        k_hop: Int[Array, ""] | int = 0,
    ) -> Partial:
        """Attention of one block over another; the blocks are those of the devices `hop` places before this one."""
        me = shard_index(AXIS)
        return block.attend(
            q_tnh,
            kv_2tkh[0],
            kv_2tkh[1],
            self.layout.positions(me - q_hop),
            self.layout.positions(me - k_hop),
            self.mask,
            scale=self.scale,
            run=self.layout.run,
        )


def stack(k_tkh: jax.Array, v_tkh: jax.Array) -> jax.Array:
    """Keys and values as one array [2 t k h], so that they travel in one piece."""
    return jnp.stack([k_tkh, v_tkh])


def tied(*values: Any) -> Any:
    """The same values, none of which is there before all of them are.

    A scheme ties what it sends to what it computes meanwhile. Without that, XLA's schedule for TPU v6e sent all blocks first
    and then attended to all of them, with nothing hidden and four times the memory.
    """
    return jax.lax.optimization_barrier(values)
