"""Zig-zag order: there and back, and that it gives every device the same work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.sharding.block import Mask, tiles_with_work
from jaxserve.sharding.layout import Layout, from_zigzag, to_zigzag
from jaxserve.sharding.mesh import Parallel, make_mesh

SPEC = PartitionSpec("sequence")


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4, 8])
def test_there_and_back(num_devices):
    share = 6
    mesh = make_mesh(Parallel(sequence=num_devices))

    def turn(x):
        moved = to_zigzag(x)
        return moved, from_zigzag(moved)

    position = np.arange(num_devices * share, dtype=np.int32)
    sharded = jax.shard_map(turn, mesh=mesh, in_specs=SPEC, out_specs=(SPEC, SPEC), check_vma=False)
    there, back = jax.jit(sharded)(position)
    layout = Layout(num_devices, share, zigzag=num_devices > 1)
    np.testing.assert_array_equal(there, np.concatenate([layout.positions(i) for i in range(num_devices)]))
    np.testing.assert_array_equal(back, position)


def work_of(layout: Layout, tile: int) -> np.ndarray:
    """Scores that are computed for the queries of each device, of all devices' keys."""
    mask = Mask(jnp.int32(layout.num_devices * layout.num_tokens), True, None)
    positions = [layout.positions(i).reshape(-1, tile) for i in range(layout.num_devices)]
    tiles = [sum(int(tiles_with_work(q, k, mask).sum()) for k in positions) for q in positions]
    return np.array(tiles) * tile * tile


@pytest.mark.parametrize("num_devices", [4, 8])
def test_zigzag_balances_causal_work(num_devices):
    """Counted by single scores, devices with zig-zag have the very same number; in order the last has (2 P - 1) / P of the
    mean, but for half a score for each token on the diagonal. In tiles alike."""
    share = 32
    zigzag, in_order = (Layout(num_devices, share, zigzag) for zigzag in (True, False))
    for tile in (1, 8):
        assert len(set(work_of(zigzag, tile))) == 1
    work = work_of(in_order, 1)
    diagonal = share * num_devices / 2
    ideal = work - share / 2
    assert ideal.sum() + diagonal == work.sum()
    assert ideal.max() / ideal.mean() == pytest.approx((2 * num_devices - 1) / num_devices)
    assert work.max() / work.mean() == pytest.approx((2 * num_devices - 1) / num_devices, rel=0.02)
