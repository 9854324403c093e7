"""Ring attention: keys and values travel from device to device, queries stay.

The next block is under way while one is attended to (`call.tied`). Loops are unrolled: every step is a permute of its own.
"""

import jax

from jaxserve.sharding.call import Call, stack, tied
from jaxserve.sharding.collectives import send
from jaxserve.sharding.layout import AXIS
from jaxserve.sharding.merge import merge


def ring(q_tnh: jax.Array, k_tkh: jax.Array, v_tkh: jax.Array, call: Call) -> jax.Array:
    """All one way round: P - 1 steps, each with the keys and values of one device.

    Source: arXiv 2310.01889.
    """
    own = stack(k_tkh, v_tkh)
    coming = _forward(own) if call.num_steps else own
    done = call.attend(q_tnh, own)
    for step in range(1, call.num_steps + 1):
        here, done = tied(coming, done)
        coming = _forward(here) if step < call.num_steps else here
        part = call.attend(q_tnh, here, k_hop=step)
        coming, part = tied(coming, part)
        done = merge(done, part)
    return done.out_tnh


def both_ways(q_tnh: jax.Array, k_tkh: jax.Array, v_tkh: jax.Array, call: Call) -> jax.Array:
    """Two copies go opposite ways: half the steps, with both directions of every link in use. No window ends it early."""
    ahead, behind = call.num_devices // 2, (call.num_devices - 1) // 2  # steps in each direction
    own = stack(k_tkh, v_tkh)
    coming = (_forward(own) if ahead else own, _backward(own) if behind else own)
    done = call.attend(q_tnh, own)
    for step in range(1, ahead + 1):
        (before, after), done = tied(coming, done)
        coming = (_forward(before) if step < ahead else before, _backward(after) if step < behind else after)
        parts = [call.attend(q_tnh, before, k_hop=step)]
        if step <= behind:
            parts.append(call.attend(q_tnh, after, k_hop=-step))
        coming, parts = tied(coming, parts)
        for part in parts:
            done = merge(done, part)
    return done.out_tnh


def _forward(x: jax.Array) -> jax.Array:
    return send(AXIS, x, lambda i: i + 1)


def _backward(x: jax.Array) -> jax.Array:
    return send(AXIS, x, lambda i: i - 1)
