"""How arrays are split, and meshes made."""

import jax
import pytest
from jax.sharding import PartitionSpec

from jaxserve.errors import ConfigError
from jaxserve.models.kv import POOL_AXES
from jaxserve.sharding.mesh import Parallel, make_mesh
from jaxserve.sharding.rules import RULES, partition


def test_axes_without_a_rule_stay_whole():
    assert partition(["vocab", "embed"]) == PartitionSpec(("expert", "tensor"), None)
    assert partition([None, "ffn", "embed"]) == PartitionSpec(None, ("expert", "tensor"), None)


def test_two_axes_over_the_same_devices_are_refused():
    with pytest.raises(ValueError, match="split twice over the mesh axis 'expert'"):
        partition(["heads", "ffn"])
    assert partition(["experts", "expert_ffn"]) == PartitionSpec(("expert",), ("tensor",))


def test_the_pool_is_split_over_every_device():
    parallel = Parallel(data=2, sequence=2, expert=2, tensor=2)
    assert parallel.num_shards(*POOL_AXES) == parallel.num_devices == 16


def test_shards_are_counted_by_the_rules():
    parallel = Parallel(data=2, sequence=3, expert=5, tensor=7)
    assert parallel.num_shards("experts", "expert_ffn", "embed") == 35
    assert parallel.num_shards("pool_heads") == 105
    assert parallel.num_shards(None) == 1
    assert all(parallel.num_shards(name) > 1 for name in RULES)


def test_a_mesh_has_every_axis():
    mesh = make_mesh(Parallel(data=2, tensor=4))
    assert dict(mesh.shape) == {"data": 2, "sequence": 1, "expert": 1, "tensor": 4}
    assert [d.id for d in mesh.devices.flat] == list(range(8))


def test_more_devices_than_there_are():
    with pytest.raises(ConfigError, match=r"data=3 x tensor=4 needs 12 devices, but there are 8.*device_count=12"):
        make_mesh(Parallel(data=3, tensor=4), jax.devices())
