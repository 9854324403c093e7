"""Which tokens of a prompt lie on which device: in order, or zig-zag, so that causal work is the same for all.

Zig-zag: the prompt is cut into two chunks per device; device r of P has chunks r and 2P - 1 - r, an early one with little to
see and a late one with much. Source: zhuzilin/ring-flash-attention.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxserve.sharding.collectives import num_shards, send, shard_index

AXIS = "tokens"  # the logical axis


class Layout(NamedTuple):
    """How the tokens of a prompt are split. All is static."""

    num_devices: int
    num_tokens: int  # on each device
    zigzag: bool

    @property
    def run(self) -> int:
        """So many tokens on a device are neighbours in the prompt."""
        return self.num_tokens // 2 if self.zigzag else self.num_tokens

    def positions(self, device: Int[Array, ""] | int) -> Int[Array, " t"]:
        """Where in the prompt the tokens of a device stand; `device` is taken modulo P."""
        device = device % self.num_devices
        offset = jnp.arange(self.run, dtype=jnp.int32)
        if not self.zigzag:
            return device * self.run + offset
        late = 2 * self.num_devices - 1 - device
        return jnp.concatenate([device * self.run + offset, late * self.run + offset])


def to_zigzag(x: jax.Array) -> jax.Array:
    """This device's tokens [t ...] in zig-zag order, from those in order: two permutes of half the tokens, which must be
    an even number."""
    num_devices = num_shards(AXIS)
    if num_devices == 1:
        return x
    first, second = jnp.split(x, 2)
    even = send(AXIS, first, lambda i: _owner(2 * i, num_devices))
    odd = send(AXIS, second, lambda i: _owner(2 * i + 1, num_devices))
    early, late = _by_parity(even, odd)
    return jnp.concatenate([early, late])


def from_zigzag(x: jax.Array) -> jax.Array:
    """The inverse of `to_zigzag`."""
    num_devices = num_shards(AXIS)
    if num_devices == 1:
        return x
    even, odd = _by_parity(*jnp.split(x, 2))
    home = {_owner(chunk, num_devices) + (chunk % 2) * num_devices: chunk // 2 for chunk in range(2 * num_devices)}
    first = send(AXIS, even, lambda i: home[i])
    second = send(AXIS, odd, lambda i: home[i + num_devices])
    return jnp.concatenate([first, second])


def _owner(chunk: int, num_devices: int) -> int:
    return min(chunk, 2 * num_devices - 1 - chunk)


def _by_parity(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(a, b) on even devices, (b, a) on odd ones: device r's early chunk is chunk r, its late one has the other parity."""
    is_odd = shard_index(AXIS) % 2 == 1
    return jnp.where(is_odd, b, a), jnp.where(is_odd, a, b)
