"""All schemes against the formula, on emulated devices; what they send, against what the compiled program says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.sharding.hlo import collectives, totals
from jaxserve.sharding.mesh import Parallel, make_mesh
from jaxserve.sharding.prefill import prefill_attention
from jaxserve.sharding.scheme import SCHEMES, Case, sent_bytes
from tests.sharding.dense import dense, prompt

HEAD_SIZE = 16
SCALE = HEAD_SIZE**-0.5
MHA, GQA = (8, 8), (8, 4)  # query heads, KV heads
SPEC = PartitionSpec("sequence")


@functools.cache
def compiled(num_devices: int, heads: tuple[int, int], share: int, scheme: str, causal: bool, window: int | None):
    """The call for prompts of `share` tokens per device; takes whole arrays."""
    mesh = make_mesh(Parallel(sequence=num_devices))

    def attend(q_tnh, k_tkh, v_tkh, length):
        options = {"scale": SCALE, "scheme": scheme, "causal": causal, "window": window}
        return prefill_attention(q_tnh, k_tkh, v_tkh, length, **options)

    specs = {"in_specs": (SPEC, SPEC, SPEC, PartitionSpec()), "out_specs": SPEC}
    jitted = jax.jit(jax.shard_map(attend, mesh=mesh, check_vma=False, **specs))
    shapes = [(share * num_devices, n, HEAD_SIZE) for n in (heads[0], heads[1], heads[1])]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jitted.lower(*arrays, jax.ShapeDtypeStruct((), jnp.int32)).compile()


def check(num_devices, heads, share, scheme, *, causal=True, window=None, lengths):
    attend = compiled(num_devices, heads, share, scheme, causal, window)
    arrays = prompt(share * num_devices, *heads, HEAD_SIZE)
    for length in lengths:
        out = np.asarray(attend(*arrays, jnp.int32(length)))
        expected = dense(*arrays, length, scale=SCALE, causal=causal, window=window)
        np.testing.assert_allclose(out[:length], expected[:length], rtol=0, atol=1e-6)
        assert np.isfinite(out).all()
    case = Case(
        num_devices=num_devices,
        num_tokens=share * num_devices,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_size=HEAD_SIZE,
        itemsize=4,
        causal=causal,
        window=window,
    )
    sent = sum(sent for _, sent in totals(collectives(attend.as_text())).values())
    assert sent == sent_bytes(scheme, case)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("num_devices", "heads"), [(4, MHA), (4, GQA), (8, GQA)])
def test_equals_dense_and_sends_what_the_table_says(num_devices, heads, scheme):
    share = 12
    check(num_devices, heads, share, scheme, lengths=(share * num_devices, share * num_devices - 17, 5))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_not_causal(scheme):
    check(4, GQA, 12, scheme, causal=False, lengths=(48, 29))
