"""Attention of some queries over some keys, with the sum that merging needs. Plain XLA, in tiles: no score matrix is kept.

Who sees whom is decided by positions in the prompt, so that any layout of the tokens over devices will do. A tile in which
nobody sees anything is skipped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxserve.pallas_kernels.platform import precision_of
from jaxserve.sharding.merge import EMPTY, Partial

QUERIES = 128  # of a tile
KEYS = 256  # of a tile

_NOWHERE = jnp.iinfo(jnp.int32).max  # the position of a key that is none


class Mask(NamedTuple):
    """Who sees whom. All but the length is static."""

    length: jax.Array  # i32[], tokens of the prompt; what lies behind is padding
    causal: bool
    window: int | None  # a query sees so many positions, its own the last; needs `causal`

    def sees(self, q_pos_q: jax.Array, k_pos_c: jax.Array) -> jax.Array:
        """bool[q c]."""
        q_pos_q1, k_pos_1c = q_pos_q[:, None], k_pos_c[None, :]
        seen_qc = jnp.broadcast_to(k_pos_1c < self.length, (len(q_pos_q), len(k_pos_c)))
        if self.causal:
            seen_qc = seen_qc & (k_pos_1c <= q_pos_q1)
        if self.window is not None:
            seen_qc = seen_qc & (k_pos_1c > q_pos_q1 - self.window)
        return seen_qc


def attend(
    q_qnh: Float[Array, "q n h"],
    k_ckh: Float[Array, "c k h"],
    v_ckh: Float[Array, "c k h"],
    q_pos_q: Int[Array, " q"],
    k_pos_c: Int[Array, " c"],
    mask: Mask,
    *,
    scale: float,
    run: int,
) -> Partial:
    """Attention of the queries over these keys alone.

    Args:
      q_pos_q, k_pos_c: where in the prompt each token stands.
      scale: factor of q . k before the softmax (static).
      run: so many tokens are neighbours in the prompt; no tile should reach over more (static).

    Padding's values may be anything, and its queries get something finite.

    Source: arXiv 2205.14135.
    """
    num_queries, num_heads, head_size = q_qnh.shape
    num_kv_heads = k_ckh.shape[1]
    group = num_heads // num_kv_heads
    tile, chunk = min(QUERIES, run), min(KEYS, run)
    q_aqnh, q_pos_aq = _tiles(q_qnh, tile), _tiles(q_pos_q, tile, mode="edge")
    k_bckh, v_bckh, k_pos_bc = (
        _tiles(k_ckh, chunk),
        _tiles(v_ckh, chunk),
        _tiles(k_pos_c, chunk, constant_values=_NOWHERE),
    )
    work_ab = tiles_with_work(q_pos_aq, k_pos_bc, mask)
    dot = {"precision": precision_of(q_qnh.dtype), "preferred_element_type": jnp.float32}
    flat = (num_kv_heads, group * tile)

    def one_tile(args):
        q_qnh, q_pos_q, work_b = args
        q_kgqh = jnp.transpose(q_qnh.reshape(tile, num_kv_heads, group, head_size), (1, 2, 0, 3))
        q_kxh = q_kgqh.reshape(*flat, head_size)

        def one_chunk(b, state):
            top_kx, total_kx, acc_kxh = state
            k_pos_c = k_pos_bc[b]
            v_ckh = jnp.where((k_pos_c < mask.length)[:, None, None], v_bckh[b], jnp.zeros((), v_bckh.dtype))
            seen_xc = jnp.tile(mask.sees(q_pos_q, k_pos_c), (group, 1))
            scores_kxc = jnp.einsum("kxh,ckh->kxc", q_kxh, k_bckh[b], **dot) * scale
            scores_kxc = jnp.where(seen_xc[None], scores_kxc, EMPTY)
            new_kx = jnp.maximum(top_kx, jnp.max(scores_kxc, axis=-1))
            # Not the exponential alone: of a query that has seen nothing yet it would be 1.
            weights_kxc = jnp.where(seen_xc[None], jnp.exp(scores_kxc - new_kx[..., None]), 0.0)
            shrink_kx = jnp.exp(top_kx - new_kx)
            added_kxh = jnp.einsum("kxc,ckh->kxh", weights_kxc.astype(v_ckh.dtype), v_ckh, **dot)
            total_kx = total_kx * shrink_kx + jnp.sum(weights_kxc, axis=-1)
            return new_kx, total_kx, acc_kxh * shrink_kx[..., None] + added_kxh

        def if_any(b, state):
            return lax.cond(work_b[b], one_chunk, lambda _, state: state, b, state)

        nothing = (
            jnp.full(flat, EMPTY, jnp.float32),
            jnp.zeros(flat, jnp.float32),
            jnp.zeros((*flat, head_size), jnp.float32),
        )
        top_kx, total_kx, acc_kxh = lax.fori_loop(0, len(k_pos_bc), if_any, nothing)
        some_kx = jnp.where(total_kx > 0, total_kx, 1.0)
        lse_kx = jnp.where(total_kx > 0, top_kx + jnp.log(some_kx), EMPTY)
        out_kgqh = (acc_kxh / some_kx[..., None]).reshape(num_kv_heads, group, tile, head_size)
        out_qnh = jnp.transpose(out_kgqh, (2, 0, 1, 3)).reshape(tile, num_heads, head_size)
        return out_qnh, lse_kx.reshape(num_heads, tile).T

    out_aqnh, lse_aqn = lax.map(one_tile, (q_aqnh, q_pos_aq, work_ab))
    return Partial(
        out_aqnh.reshape(-1, num_heads, head_size)[:num_queries], lse_aqn.reshape(-1, num_heads)[:num_queries]
    )


def tiles_with_work(q_pos_aq: Int[Array, "a q"], k_pos_bc: Int[Array, "b c"], mask: Mask) -> Bool[Array, "a b"]:
    """In which tiles some query may see some key. Exact where the positions of a tile are neighbours."""
    first_a1, last_a1 = jnp.min(q_pos_aq, axis=1)[:, None], jnp.max(q_pos_aq, axis=1)[:, None]
    first_1b, last_1b = jnp.min(k_pos_bc, axis=1)[None, :], jnp.max(k_pos_bc, axis=1)[None, :]
    work_ab = (first_a1 < mask.length) & (first_1b < mask.length)
    if mask.causal:
        work_ab = work_ab & (first_1b <= last_a1)
    if mask.window is not None:
        work_ab = work_ab & (last_1b > first_a1 - mask.window)
    return work_ab


def _tiles(x: jax.Array, size: int, **padding: Any) -> jax.Array:
    """Cut the first axis into tiles; `padding` says how `jnp.pad` fills the last one up, with zeros if empty."""
    spare = -len(x) % size
    if spare:
        x = jnp.pad(x, ((0, spare), *((0, 0) for _ in x.shape[1:])), **padding)
    return x.reshape(-1, size, *x.shape[1:])
