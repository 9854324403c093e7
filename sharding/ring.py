"""Ring attention: keys and values travel from device to device, queries stay.

The next block is under way while one is attended to. Loops are unrolled, so that the compiler sees every step's permute.
"""

import jax

from jaxserve.sharding.call import Call, stack
from jaxserve.sharding.collectives import send
from jaxserve.sharding.layout import AXIS
from jaxserve.sharding.merge import merge


def ring(q_tnh: jax.Array, k_tkh: jax.Array, v_tkh: jax.Array, call: Call) -> jax.Array:
    """All one way round: P - 1 steps, each with the keys and values of one device.

    Source: arXiv 2310.01889.
    """
    here = stack(k_tkh, v_tkh)
    coming = _forward(here) if call.num_steps else here
    done = call.attend(q_tnh, here)
    for step in range(1, call.num_steps + 1):
        here = coming
        if step < call.num_steps:
            coming = _forward(here)
        done = merge(done, call.attend(q_tnh, here, k_hop=step))
    return done.out_tnh


def both_ways(q_tnh: jax.Array, k_tkh: jax.Array, v_tkh: jax.Array, call: Call) -> jax.Array:
    """Two copies go opposite ways: half the steps, with both directions of every link in use. No window ends it early."""
    own = stack(k_tkh, v_tkh)
    ahead, behind = call.num_devices // 2, (call.num_devices - 1) // 2  # steps in each direction
    from_before = _forward(own) if ahead else own
    from_after = _backward(own) if behind else own
    done = call.attend(q_tnh, own)
    for step in range(1, ahead + 1):
        before, after = from_before, from_after
        if step < ahead:
            from_before = _forward(before)
        if step < behind:
            from_after = _backward(after)
        done = merge(done, call.attend(q_tnh, before, k_hop=step))
        if step <= behind:
            done = merge(done, call.attend(q_tnh, after, k_hop=-step))
    return done.out_tnh


def _forward(x: jax.Array) -> jax.Array:
    return send(AXIS, x, lambda i: i + 1)


def _backward(x: jax.Array) -> jax.Array:
    return send(AXIS, x, lambda i: i - 1)
