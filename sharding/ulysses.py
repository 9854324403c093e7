"""Tokens are exchanged for heads: each device attends over the whole prompt with some of the heads."""

import math

import jax
import jax.numpy as jnp

from jaxserve.sharding import block
from jaxserve.sharding.call import Call
from jaxserve.sharding.collectives import exchange
from jaxserve.sharding.layout import AXIS


def ulysses(q_tnh: jax.Array, k_tkh: jax.Array, v_tkh: jax.Array, call: Call) -> jax.Array:
    """One all-to-all for queries, keys and values, one for the result [t n h].

    The devices must divide the query heads. KV heads are repeated where they are too few, so that each device gets those
    that its queries read.

    Source: DeepSpeed-Ulysses, arXiv 2309.14509.
    """
    num_tokens, num_heads, head_size = q_tnh.shape
    size = call.num_devices
    num_kv_heads = math.lcm(k_tkh.shape[1], size)
    k_tkh, v_tkh = (jnp.repeat(x, num_kv_heads // x.shape[1], axis=1) for x in (k_tkh, v_tkh))
    by_device = [x.reshape(num_tokens, size, -1, head_size) for x in (q_tnh, k_tkh, v_tkh)]
    fused = exchange(AXIS, jnp.concatenate(by_device, axis=2), split=1, join=0)[:, 0]
    n, k = num_heads // size, num_kv_heads // size
    whole = jnp.arange(num_tokens * size, dtype=jnp.int32)
    q, k, v = jnp.split(fused, [n, n + k], axis=1)
    done = block.attend(q, k, v, whole, whole, call.mask, scale=call.scale, run=len(whole))
    return exchange(AXIS, done.out_tnh.astype(q_tnh.dtype), split=0, join=1)
