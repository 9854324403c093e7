"""All schemes against the formula, on emulated devices; what they send, against what the compiled program says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.sharding.hlo import collectives, totals
from jaxserve.sharding.links import links_of
from jaxserve.sharding.mesh import Parallel, make_mesh
from jaxserve.sharding.prefill import prefill_attention
from jaxserve.sharding.scheme import SCHEMES, Case, choose_scheme, sent_bytes
from tests.sharding.dense import dense, prompt

HEAD_SIZE = 16
SCALE = HEAD_SIZE**-0.5
MHA, GQA, FEW = (8, 8), (8, 4), (8, 2)  # query heads, KV heads
SPEC = PartitionSpec("sequence")


def case_of(
    num_devices: int, heads: tuple[int, int], share: int, causal: bool = True, window: int | None = None
) -> Case:
    return Case(
        num_devices=num_devices,
        num_tokens=share * num_devices,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_size=HEAD_SIZE,
        itemsize=4,
        causal=causal,
        window=window,
    )


def compile_scheme(case: Case, scheme: str, **options):
    """The call, for whole arrays and a length."""

    def attend(q_tnh, k_tkh, v_tkh, length):
        flags = {"causal": case.causal, "window": case.window}
        return prefill_attention(q_tnh, k_tkh, v_tkh, length, scale=SCALE, scheme=scheme, **flags, **options)

    specs = {"in_specs": (SPEC, SPEC, SPEC, PartitionSpec()), "out_specs": SPEC}
    mesh = make_mesh(Parallel(sequence=case.num_devices))
    jitted = jax.jit(jax.shard_map(attend, mesh=mesh, check_vma=False, **specs))
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    arrays = [jax.ShapeDtypeStruct((case.num_tokens, n, HEAD_SIZE), jnp.float32) for n in heads]
    return jitted.lower(*arrays, jax.ShapeDtypeStruct((), jnp.int32)).compile()


def check(case: Case, scheme: str, lengths: tuple[int, ...]) -> None:
    attend = compile_scheme(case, scheme)
    arrays = prompt(case.num_tokens, case.num_heads, case.num_kv_heads, HEAD_SIZE)
    for length in lengths:
        out = np.asarray(attend(*arrays, jnp.int32(length)))
        expected = dense(*arrays, length, scale=SCALE, causal=case.causal, window=case.window)
        np.testing.assert_allclose(out[:length], expected[:length], rtol=0, atol=1e-6)
        assert np.isfinite(out).all()
    sent = sum(sent for _, sent in totals(collectives(attend.as_text())).values())
    assert sent == sent_bytes(scheme, case)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("num_devices", "heads"),
    [
        (4, GQA),
        pytest.param(4, MHA, marks=pytest.mark.slow),
        pytest.param(8, GQA, marks=pytest.mark.slow),
    ],
)
def test_equals_dense_and_sends_what_the_table_says(num_devices, heads, scheme):
    """Whole prompts, some that end within a device's share, and one that the first device has alone."""
    check(case_of(num_devices, heads, 12), scheme, (12 * num_devices, 12 * num_devices - 17, 5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "num_devices"), [("zigzag", 2), ("bidirectional", 2), ("zigzag", 3), ("bidirectional", 3)]
)
def test_two_and_three_devices(scheme, num_devices):
    """Two have one way only, and keep half of their tokens in zig-zag; three have as many steps in both directions."""
    check(case_of(num_devices, (6, 3), 12), scheme, (12 * num_devices, 17))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_not_causal(scheme):
    check(case_of(4, FEW, 12, causal=False), scheme, (48, 29))


@pytest.mark.parametrize(("scheme", "window"), [("ring", 14), ("tokenring", 13), ("ring", 1)])
def test_a_window_ends_the_way_early(scheme, window):
    """14 reaches back over two blocks of 12, 13 over one, 1 over none."""
    check(case_of(4, MHA, 12, window=window), scheme, (48, 29))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gather", "ulysses", "zigzag"])
def test_a_window_by_the_others(scheme):
    check(case_of(4, GQA, 12, window=14), scheme, (48, 29))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["gather", "zigzag"])
def test_several_tiles(scheme):
    check(case_of(4, GQA, 600), scheme, (2400, 1111))


def test_one_device_sends_nothing():
    """All schemes in one program: what is the same is compiled once."""
    mesh, arrays = make_mesh(Parallel()), prompt(24, *GQA, HEAD_SIZE)

    def attend(q_tnh, k_tkh, v_tkh, length):
        return [prefill_attention(q_tnh, k_tkh, v_tkh, length, scale=SCALE, scheme=scheme) for scheme in SCHEMES]

    specs = {"in_specs": (SPEC, SPEC, SPEC, PartitionSpec()), "out_specs": SPEC}
    jitted = jax.jit(jax.shard_map(attend, mesh=mesh, check_vma=False, **specs))
    for out in jitted(*arrays, jnp.int32(7)):
        np.testing.assert_allclose(out[:7], dense(*arrays, 7, scale=SCALE)[:7], rtol=0, atol=1e-6)
    assert not collectives(jitted.lower(*arrays, jnp.int32(7)).compile().as_text())


@pytest.mark.parametrize("scheme", ["zigzag", "ulysses"])
def test_with_heads_split_over_another_axis(scheme):
    """2 x 2 devices: each pair shares the tokens of half of the heads."""
    spec = PartitionSpec("sequence", "tensor")
    mesh = make_mesh(Parallel(sequence=2, tensor=2))

    def attend(q_tnh, k_tkh, v_tkh, length):
        return prefill_attention(q_tnh, k_tkh, v_tkh, length, scale=SCALE, scheme=scheme)

    specs = {"in_specs": (spec, spec, spec, PartitionSpec()), "out_specs": spec}
    arrays = prompt(24, *GQA, HEAD_SIZE)
    out = jax.jit(jax.shard_map(attend, mesh=mesh, check_vma=False, **specs))(*arrays, jnp.int32(19))
    np.testing.assert_allclose(out[:19], dense(*arrays, 19, scale=SCALE)[:19], rtol=0, atol=1e-6)


def test_outside_of_a_mesh():
    arrays = prompt(21, *GQA, HEAD_SIZE)
    out = prefill_attention(*map(jnp.asarray, arrays), jnp.int32(21), scale=SCALE, scheme="zigzag")
    np.testing.assert_allclose(out, dense(*arrays, 21, scale=SCALE), rtol=0, atol=1e-6)


def test_auto_takes_what_the_rule_says():
    case, links = case_of(4, FEW, 12), links_of("TPU v6 lite")
    attend = compile_scheme(case, "auto", links=links)
    sent = sum(sent for _, sent in totals(collectives(attend.as_text())).values())
    assert sent == sent_bytes(choose_scheme(case, links), case)


@pytest.mark.parametrize(
    ("scheme", "heads", "share", "window", "reason"),
    [
        ("ulysses", (6, 2), 12, None, "ulysses: 6 query heads cannot be split over 4 devices"),
        ("zigzag", GQA, 11, None, "zigzag: zig-zag needs an even number of tokens on each device, not 11"),
        ("bidirectional", GQA, 12, 14, "bidirectional: a window of 14 reaches back"),
        ("pass_q", GQA, 12, 14, "pass_q: a window of 14 reaches back"),
    ],
)
def test_refuses_with_the_reason(scheme, heads, share, window, reason):
    with pytest.raises(NotImplementedError, match=reason):
        compile_scheme(case_of(4, heads, share, window=window), scheme)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="scheme='rings' is unknown; there are: auto, gather"):
        compile_scheme(case_of(4, GQA, 12), "rings")
    with pytest.raises(ValueError, match=r"window=3 .* needs causal=False to be True"):
        compile_scheme(case_of(4, GQA, 12, causal=False, window=3), "ring")
