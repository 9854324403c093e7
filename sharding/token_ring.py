"""Queries travel and keys and values stay. With as many KV heads as query heads a query block is half of what a ring moves.

Queries go to the device before, where the keys are that they look back to; so a window may end the way early. Blocks and
results are under way while the next block is attended to (`call.tied`).
"""

import jax
import jax.numpy as jnp

from jaxserve.sharding.call import Call, stack, tied
from jaxserve.sharding.collectives import send
from jaxserve.sharding.layout import AXIS
from jaxserve.sharding.merge import Partial, merge


def token_ring(q_tnh: jax.Array, k_tkh: jax.Array, v_tkh: jax.Array, call: Call) -> jax.Array:
    """What was computed for a query goes straight back to its owner, the other way. For devices that are all linked.

    Source: TokenRing, arXiv 2412.20501.
    """
    kv_2tkh = stack(k_tkh, v_tkh)
    coming = _backward(q_tnh) if call.num_steps else q_tnh
    done = part = call.attend(q_tnh, kv_2tkh)
    for step in range(1, call.num_steps + 1):
        here, part = tied(coming, part)
        coming = _backward(here) if step < call.num_steps else here
        returned = _send(part, step - 1)
        part = call.attend(here, kv_2tkh, q_hop=-step)
        coming, returned, part = tied(coming, returned, part)
        done = returned if step == 1 else merge(done, returned)
    return merge(done, _send(part, call.num_steps)).out_tnh if call.num_steps else done.out_tnh


def pass_q(q_tnh: jax.Array, k_tkh: jax.Array, v_tkh: jax.Array, call: Call) -> jax.Array:
    """Results travel behind their queries and come home at the end: neighbours alone talk, as a torus likes it. No window
    ends it early."""
    kv_2tkh = stack(k_tkh, v_tkh)
    coming = _backward(q_tnh) if call.num_steps else q_tnh
    done = call.attend(q_tnh, kv_2tkh)
    for step in range(1, call.num_steps + 1):
        here, done = tied(coming, done)
        coming = _backward(here) if step < call.num_steps else here
        done = _send(done, -1)
        part = call.attend(here, kv_2tkh, q_hop=-step)
        coming, done, part = tied(coming, done, part)
        done = merge(done, part)
    return _backward(done.out_tnh.astype(q_tnh.dtype))


def _backward(x: jax.Array) -> jax.Array:
    return send(AXIS, x, lambda i: i - 1)


def _send(part: Partial, hops: int) -> Partial:
    """Output and logarithm in one piece, float32."""
    if not hops:
        return part
    packed_tnx = jnp.concatenate([part.out_tnh, part.lse_tn[..., None]], axis=-1)
    packed_tnx = send(AXIS, packed_tnx, lambda i: i + hops)
    return Partial(packed_tnx[..., :-1], packed_tnx[..., -1])
