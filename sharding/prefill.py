"""Attention of a whole prompt whose tokens are split over devices, by any of the schemes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxserve.sharding.block import Mask
from jaxserve.sharding.call import Call
from jaxserve.sharding.collectives import num_shards
from jaxserve.sharding.gathered import gathered
from jaxserve.sharding.layout import AXIS, Layout, from_zigzag, to_zigzag
from jaxserve.sharding.links import links_here
from jaxserve.sharding.ring import both_ways, ring
from jaxserve.sharding.scheme import Case, Links, choose_scheme, refusal
from jaxserve.sharding.token_ring import pass_q, token_ring
from jaxserve.sharding.ulysses import ulysses

_RUNS = {
    "gather": gathered,
    "ulysses": ulysses,
    "ring": ring,
    "bidirectional": both_ways,
    "zigzag": ring,
    "tokenring": token_ring,
    "pass_q": pass_q,
}


def prefill_attention(
    q_tnh: Float[Array, "t n h"],
    k_tkh: Float[Array, "t k h"],
    v_tkh: Float[Array, "t k h"],
    length: Int[Array, ""],
    *,
    scale: float,
    scheme: str = "auto",
    causal: bool = True,
    window: int | None = None,
    links: Links | None = None,
) -> Float[Array, "t n h"]:
    """Attention of a prompt that starts at position 0 and is alone in its step; runs inside `jax.shard_map`.

    Device i of the P that share the logical axis "tokens" has tokens i t .. (i + 1) t - 1, and gets their results. Outside
    of a mesh, or with one device, nothing is sent.

    Args:
      q_tnh: this device's queries, rotated, not scaled; n is a multiple of the k KV heads.
      k_tkh, v_tkh: its keys (rotated) and values.
      length: i32[], tokens of the whole prompt; those behind it are padding, whose output is unspecified but finite.
      scale: factor of q . k before the softmax (static).
      scheme: one of `scheme.SCHEMES`, or "auto" for what `scheme.choose_scheme` takes (static).
      causal: no token sees later ones (static).
      window: attend only to the last `window` positions, the query's own included; None for all (static).
      links: what "auto" reckons with; None: by the kind of device (static).

    Returns: float[t n h] in q's dtype; softmax and sums are float32.

    Raises:
      NotImplementedError: the scheme asked for by name cannot take the case, with the reason.
      ValueError: an unknown scheme, or a window without `causal`.
    """
    if window is not None and not (causal and window >= 1):
        raise ValueError(f"{window=} must be at least 1, or None, and needs {causal=} to be True")
    num_tokens, num_heads, head_size = q_tnh.shape
    num_devices = num_shards(AXIS)
    case = Case(
        num_devices=num_devices,
        num_tokens=num_tokens * num_devices,
        num_heads=num_heads,
        num_kv_heads=k_tkh.shape[1],
        head_size=head_size,
        itemsize=q_tnh.dtype.itemsize,
        causal=causal,
        window=window,
    )
    if scheme == "auto":
        scheme = choose_scheme(case, links or links_here())
    elif reason := refusal(scheme, case):
        raise NotImplementedError(f"{scheme}: {reason}")
    is_zigzag = scheme == "zigzag" and num_devices > 1
    num_steps = num_devices - 1 if is_zigzag else case.num_steps
    call = Call(Layout(num_devices, num_tokens, is_zigzag), Mask(length, causal, window), scale, num_steps)
    with jax.named_scope(scheme):
        if is_zigzag:
            heads = (num_heads, num_heads + k_tkh.shape[1])
            q_tnh, k_tkh, v_tkh = jnp.split(to_zigzag(jnp.concatenate([q_tnh, k_tkh, v_tkh], axis=1)), heads, axis=1)
        out_tnh = _RUNS[scheme](q_tnh, k_tkh, v_tkh, call).astype(q_tnh.dtype)
        return from_zigzag(out_tnh) if is_zigzag else out_tnh
