"""The TPU compiler takes a scheme for four real devices, sends what the table says, and hides it behind computing."""

import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxserve.pallas_kernels.ahead_of_time import has_compiler
from jaxserve.sharding.hlo import collectives, totals
from jaxserve.sharding.mesh import AXES
from jaxserve.sharding.prefill import prefill_attention
from jaxserve.sharding.scheme import Case, sent_bytes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not has_compiler(), reason="needs the libtpu package")]

CASE = Case(num_devices=4, num_tokens=8192, num_heads=32, num_kv_heads=8, head_size=128, itemsize=2)


@pytest.fixture
def uncached():
    """A program for a chip that is not here would be kept, found again, and could not be read."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def compile_scheme(scheme: str, topology: str) -> jax.stages.Compiled:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    shape = (1, len(devices), 1, 1)
    kinds = {"axis_names": AXES, "axis_types": (AxisType.Auto,) * 4}
    mesh = Mesh(np.array(devices).reshape(shape), **kinds)
    chip = AbstractDevice(platform="tpu", device_kind=devices[0].device_kind, num_cores=devices[0].num_cores or 1)
    split, whole = PartitionSpec("sequence"), PartitionSpec()

    def attend(q_tnh, k_tkh, v_tkh, length):
        return prefill_attention(q_tnh, k_tkh, v_tkh, length, scale=0.1, scheme=scheme)

    specs = {"in_specs": (split, split, split, whole), "out_specs": split}
    jitted = jax.jit(jax.shard_map(attend, mesh=mesh, check_vma=False, **specs))
    heads = (CASE.num_heads, CASE.num_kv_heads, CASE.num_kv_heads)
    shapes = [((CASE.num_tokens, n, CASE.head_size), jnp.bfloat16, split) for n in heads] + [((), jnp.int32, whole)]
    arrays = [jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, spec)) for s, dtype, spec in shapes]
    with jax.sharding.use_abstract_mesh(AbstractMesh(shape, abstract_device=chip, **kinds)):
        lowered = jitted.lower(*arrays)
    return lowered.compile()


@pytest.mark.usefixtures("uncached", "optimized")
@pytest.mark.parametrize(("scheme", "topology"), [("ring", "v6e:2x2")])
def test_what_travels_is_hidden_behind_what_is_computed(scheme, topology):
    compiled = compile_scheme(scheme, topology)
    found = collectives(compiled.as_text())
    assert sum(sent for _, sent in totals(found).values()) == sent_bytes(scheme, CASE)
    assert [one.kind for one in found] == ["collective-permute"] * 3
    assert all(one.is_async and one.between for one in found), "a block is waited for"
    blocks = CASE.partial_bytes + 2 * CASE.kv_bytes
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * blocks, "blocks pile up"
