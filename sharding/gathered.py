"""Keys and values of all devices are gathered at once: one collective. Best where there are few KV heads."""

import jax
import jax.numpy as jnp

from jaxserve.sharding import block
from jaxserve.sharding.call import Call, stack
from jaxserve.sharding.collectives import gather, shard_index
from jaxserve.sharding.layout import AXIS


def gathered(q_tnh: jax.Array, k_tkh: jax.Array, v_tkh: jax.Array, call: Call) -> jax.Array:
    """Also the softmax layers' part of LASP-2H. Each device holds the prompt's keys and values while a layer runs.

    Source: Llama 3, arXiv 2407.21783, section 3.3.2.
    """
    k_ckh, v_ckh = gather(AXIS, stack(k_tkh, v_tkh), axis=1)
    whole = jnp.arange(len(k_ckh), dtype=jnp.int32)
    mine = call.layout.positions(shard_index(AXIS))
    done = block.attend(q_tnh, k_ckh, v_ckh, mine, whole, call.mask, scale=call.scale, run=call.layout.run)
    return done.out_tnh
