"""Partial attention and its merge: results over parts of the keys become the result over all of them, exactly.

The merge is associative and commutative, so parts may be merged in any order and on any device.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.sharding.collectives import max_over, sum_over

EMPTY = -1e30  # the logarithm of nothing: finite, so that no infinity is taken from another


class Partial(NamedTuple):
    """Attention over some of the keys, in float32: parts rounded to less lose accuracy that one can see."""

    out_tnh: jax.Array  # f32[t n h], weighted mean of the values
    lse_tn: jax.Array  # f32[t n], logarithm of the sum of the weights; EMPTY where a query saw no key


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both. A part without keys leaves the other as it is, bit by bit.

    Source: Ring Attention, arXiv 2310.01889, as made safe from overflow in zhuzilin/ring-flash-attention; with both weights
    as a sigmoid and the larger logarithm taken first, so that an empty part may stand on either side.
    """
    of_a_tn, of_b_tn = jax.nn.sigmoid(a.lse_tn - b.lse_tn), jax.nn.sigmoid(b.lse_tn - a.lse_tn)
    out_tnh = of_a_tn[..., None] * a.out_tnh + of_b_tn[..., None] * b.out_tnh
    return Partial(out_tnh, jnp.logaddexp(a.lse_tn, b.lse_tn))


def merge_over(logical: str, part: Partial) -> Partial:
    """The merge of all devices' parts for the same queries, on each of them: decoding with a context that is split.

    Source: DistAttention, arXiv 2401.02669.
    """
    top_tn = max_over(logical, part.lse_tn)
    weight_tn = jnp.exp(part.lse_tn - top_tn)
    total_tn = sum_over(logical, weight_tn)
    out_tnh = sum_over(logical, weight_tn[..., None] * part.out_tnh) / total_tn[..., None]
    return Partial(out_tnh, top_tn + jnp.log(total_tn))
