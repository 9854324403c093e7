"""The merge of partial results: the same in any order, exact with nothing, and finite at the extremes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.sharding.merge import EMPTY, Partial, merge, merge_over
from jaxserve.sharding.mesh import Parallel, make_mesh
from tests.sharding.dense import dense, prompt


def random_part(seed: int) -> Partial:
    rng = np.random.default_rng(seed)
    out_tnh = rng.standard_normal((9, 4, 8)).astype(np.float32)
    return Partial(jnp.asarray(out_tnh), jnp.asarray(rng.normal(0, 5, (9, 4)).astype(np.float32)))


def nothing() -> Partial:
    return Partial(jnp.zeros((9, 4, 8)), jnp.full((9, 4), EMPTY))


def assert_close(a: Partial, b: Partial, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(a.out_tnh, b.out_tnh, rtol=0, atol=atol)
    np.testing.assert_allclose(a.lse_tn, b.lse_tn, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("jitted", [merge, jax.jit(merge)])
def test_order_does_not_matter(jitted):
    a, b, c = map(random_part, range(3))
    assert_close(jitted(a, b), jitted(b, a))
    assert_close(jitted(jitted(a, b), c), jitted(a, jitted(b, c)))


@pytest.mark.parametrize("jitted", [merge, jax.jit(merge)])
def test_nothing_changes_nothing(jitted):
    """Bit by bit, on either side; and nothing with nothing stays nothing."""
    part = random_part(0)
    for merged in (jitted(part, nothing()), jitted(nothing(), part)):
        np.testing.assert_array_equal(merged.out_tnh, part.out_tnh)
        np.testing.assert_array_equal(merged.lse_tn, part.lse_tn)
    both = jitted(nothing(), nothing())
    assert not both.out_tnh.any() and (both.lse_tn <= EMPTY / 2).all()


@pytest.mark.parametrize(("first", "second"), [(1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (-1e4, -1e4)])
def test_extremes_are_finite(first, second):
    a, b = (random_part(seed)._replace(lse_tn=jnp.full((9, 4), lse)) for seed, lse in ((0, first), (1, second)))
    merged = merge(a, b)
    mean = (a.out_tnh + b.out_tnh) / 2
    expected = mean if first == second else (a if first > second else b).out_tnh
    np.testing.assert_allclose(merged.out_tnh, expected, rtol=1e-6)
    np.testing.assert_allclose(merged.lse_tn, max(first, second), rtol=1e-4)


def parts_of(q_tnh, k_tkh, v_tkh, bounds: list[int], scale: float) -> Partial:
    """Attention over each range of keys, stacked; a range may be empty."""
    outs, lses = [], []
    for begin, end in itertools.pairwise(bounds):
        scores_tnc = np.einsum("tnh,cnh->tnc", q_tnh, k_tkh[begin:end]).astype(np.float64) * scale
        total_tn = np.exp(scores_tnc).sum(axis=-1)
        out_tnh = np.einsum("tnc,cnh->tnh", np.exp(scores_tnc), v_tkh[begin:end])
        outs.append(out_tnh / np.where(total_tn > 0, total_tn, 1)[..., None])
        lses.append(np.where(total_tn > 0, np.log(np.where(total_tn > 0, total_tn, 1)), EMPTY))
    return Partial(jnp.asarray(np.stack(outs), jnp.float32), jnp.asarray(np.stack(lses), jnp.float32))


@pytest.mark.parametrize("bounds", [[0, 1, 1, 17, 40], [0, 0, 39, 40, 40]])
def test_parts_become_the_whole(bounds):
    """Pieces of no and one key included; merged in a chain, in a tree, and over devices (a context split over them)."""
    q_tnh, k_tkh, v_tkh = prompt(40, 4, 4, 8)
    parts = parts_of(q_tnh, k_tkh, v_tkh, bounds, scale=0.3)
    whole = dense(q_tnh, k_tkh, v_tkh, 40, scale=0.3, causal=False)
    a, b, c, d = (Partial(out, lse) for out, lse in zip(*parts, strict=True))
    chain, tree = merge(merge(merge(a, b), c), d), merge(merge(d, a), merge(c, b))
    mesh = make_mesh(Parallel(sequence=4))
    split = PartitionSpec("sequence")

    def over(out_1tnh, lse_1tn):
        merged = merge_over("tokens", Partial(out_1tnh[0], lse_1tn[0]))
        return merged.out_tnh[None], merged.lse_tn[None]

    everywhere = jax.shard_map(over, mesh=mesh, in_specs=(split, split), out_specs=(split, split), check_vma=False)
    outs, lses = jax.jit(everywhere)(*parts)
    for merged in (chain, tree, *(Partial(out, lse) for out, lse in zip(outs, lses, strict=True))):
        np.testing.assert_allclose(merged.out_tnh, whole, rtol=0, atol=1e-6)
        np.testing.assert_allclose(merged.lse_tn, chain.lse_tn, rtol=1e-6)
