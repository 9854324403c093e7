"""Linear attention over emulated devices against the recurrence in float64, and what it sends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.sharding.hlo import collectives, totals
from jaxserve.sharding.linear import BLOCK, decode_step, linear_attention
from jaxserve.sharding.mesh import Parallel, make_mesh

HEADS, KV_HEADS, KEY, VALUE = 4, 2, 8, 6
SPLIT, WHOLE = PartitionSpec("sequence"), PartitionSpec()


def recurrence(q_tnh, k_tkh, v_tkd, decay_tk, causal: bool = True):
    """float64: outputs [t n d] and the last state [k h d], one token after the other."""
    group = q_tnh.shape[1] // k_tkh.shape[1]
    state = np.zeros((k_tkh.shape[1], k_tkh.shape[2], v_tkd.shape[2]))
    states = []
    for k_kh, v_kd, decay_k in zip(k_tkh, v_tkd, decay_tk, strict=True):
        state = decay_k[:, None, None] * state + k_kh[:, :, None].astype(np.float64) * v_kd[:, None, :]
        states.append(state)
    if not causal:
        states = [state] * len(states)
    q_tkgh = q_tnh.reshape(len(q_tnh), k_tkh.shape[1], group, -1).astype(np.float64)
    out = [np.einsum("kgh,khd->kgd", q, s).reshape(q_tnh.shape[1], -1) for q, s in zip(q_tkgh, states, strict=True)]
    return np.stack(out), state


def tokens(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = [(count, HEADS, KEY), (count, KV_HEADS, KEY), (count, KV_HEADS, VALUE)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def decays(kind: str, count: int):
    """None, one for each head, one for each token, or packed requests: 0 where the next one begins."""
    rng = np.random.default_rng(1)
    if kind == "none":
        return None
    if kind == "heads":
        return np.broadcast_to(np.float32([0.99, 0.6]), (count, KV_HEADS)).copy()
    decay_tk = rng.uniform(0.3, 1.0, (count, KV_HEADS)).astype(np.float32)
    if kind == "packed":
        decay_tk[[3, 4, count // 2, count - 7]] = 0.0
    return decay_tk


def compile_linear(num_devices: int, count: int, kind: str, *, causal: bool = True, dtype=jnp.float32):
    has_decay = kind != "none"

    def attend(q_tnh, k_tkh, v_tkd, decay_tk, length):
        options = {"decay_tk": decay_tk if has_decay else None, "causal": causal}
        return linear_attention(q_tnh, k_tkh, v_tkd, length, **options)

    mesh = make_mesh(Parallel(sequence=num_devices))
    specs = {"in_specs": (SPLIT, SPLIT, SPLIT, SPLIT if has_decay else WHOLE, WHOLE), "out_specs": (SPLIT, WHOLE)}
    jitted = jax.jit(jax.shard_map(attend, mesh=mesh, check_vma=False, **specs))
    shapes = [jax.ShapeDtypeStruct(x.shape, dtype) for x in tokens(count)]
    decay = jax.ShapeDtypeStruct((count, KV_HEADS), jnp.float32) if has_decay else None
    return jitted.lower(*shapes, decay, jax.ShapeDtypeStruct((), jnp.int32)).compile()


def assert_close(actual, expected, rtol: float = 1e-5):
    """Relative to the largest number: single results may be differences of large ones."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * max(np.abs(expected).max(), 1.0))


def check(num_devices: int, share: int, kind: str, causal: bool = True):
    count = num_devices * share
    attend = compile_linear(num_devices, count, kind, causal=causal)
    arrays, decay_tk = tokens(count), decays(kind, count)
    every_tk = np.ones((count, KV_HEADS), np.float32) if decay_tk is None else decay_tk
    for length in (count, count * 2 // 3, 3):
        out, state = attend(*arrays, decay_tk, jnp.int32(length))
        expected, last = recurrence(*(x[:length] for x in (*arrays, every_tk)), causal=causal)
        assert_close(np.asarray(out)[:length], expected)
        assert_close(state, last)
        assert np.isfinite(out).all()
    return attend


@pytest.mark.parametrize("kind", ["none", "heads", "tokens", "packed"])
@pytest.mark.parametrize(
    "num_devices", [1, pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)
def test_equals_the_recurrence_with_one_gather_of_states(num_devices, kind):
    attend = check(num_devices, 10, kind)
    numbers = KV_HEADS * (KEY * VALUE + (kind != "none"))
    expected = {"all-gather": (1, (num_devices - 1) * numbers * 4)} if num_devices > 1 else {}
    assert totals(collectives(attend.as_text())) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "packed"])
def test_several_blocks(kind):
    check(2, 2 * BLOCK + 30, kind)


@pytest.mark.parametrize("num_devices", [1, 4])
def test_both_directions_need_one_sum(num_devices):
    attend = check(num_devices, 10, "none", causal=False)
    size = KV_HEADS * KEY * VALUE * 4
    expected = {"all-reduce": (1, 2 * size * (num_devices - 1) // num_devices)} if num_devices > 1 else {}
    assert totals(collectives(attend.as_text())) == expected


@pytest.mark.parametrize("kind", ["none", "tokens"])
def test_decoding_goes_on_from_the_prompt(kind):
    """A prompt over 4 devices, shorter than its padding, then 8 tokens one by one, as the recurrence over all has them."""
    count, length, decoded = 40, 29, 8
    arrays, decay_tk = tokens(count), decays(kind, count)
    more, more_decay = (
        tokens(decoded, seed=2),
        np.float32(np.random.default_rng(3).uniform(0.3, 1, (decoded, KV_HEADS))),
    )
    _, state = compile_linear(4, count, kind)(*arrays, decay_tk, jnp.int32(length))
    state_skhd, outs = jnp.asarray(state)[None], []
    for token in range(decoded):
        q, k, v = (jnp.asarray(x[token])[None] for x in more)
        decay_sk = None if decay_tk is None else jnp.asarray(more_decay[token])[None]
        out, state_skhd = decode_step(q, k, v, state_skhd, decay_sk=decay_sk)
        outs.append(out[0])
    ones = np.ones((count, KV_HEADS), np.float32), np.ones((decoded, KV_HEADS), np.float32)
    before_tk, after_tk = ones if decay_tk is None else (decay_tk, more_decay)
    joined = [np.concatenate([a[:length], b]) for a, b in zip((*arrays, before_tk), (*more, after_tk), strict=True)]
    expected, last = recurrence(*joined)
    assert_close(np.stack(outs), expected[length:])
    assert_close(state_skhd[0], last)


def test_a_prompt_in_chunks_is_the_prompt():
    arrays, decay_tk = [jnp.asarray(x) for x in tokens(30)], jnp.asarray(decays("tokens", 30))
    attend = jax.jit(linear_attention)
    whole, last = attend(*arrays, jnp.int32(30), decay_tk=decay_tk)
    first, state = attend(*(x[:15] for x in arrays), jnp.int32(15), decay_tk=decay_tk[:15])
    second, state = attend(*(x[15:] for x in arrays), jnp.int32(15), decay_tk=decay_tk[15:], state_khd=state)
    assert_close(jnp.concatenate([first, second]), whole)
    assert_close(state, last)


def test_decays_of_one_and_zero():
    """1: as without. 0: each token sees itself alone."""
    arrays = [jnp.asarray(x) for x in tokens(20)]
    attend = jax.jit(linear_attention)
    plain, _ = attend(*arrays, jnp.int32(20))
    ones, _ = attend(*arrays, jnp.int32(20), decay_tk=jnp.ones((20, KV_HEADS)))
    np.testing.assert_allclose(ones, plain, rtol=1e-6, atol=1e-6)
    alone, state = attend(*arrays, jnp.int32(20), decay_tk=jnp.zeros((20, KV_HEADS)))
    q_tkgh = arrays[0].reshape(20, KV_HEADS, -1, KEY)
    own_tkgd = jnp.einsum("tkgh,tkh->tkg", q_tkgh, arrays[1])[..., None] * arrays[2][:, :, None]
    assert_close(alone, own_tkgd.reshape(20, HEADS, VALUE))
    assert_close(state, jnp.einsum("kh,kd->khd", arrays[1][-1], arrays[2][-1]))


def test_no_token_sees_later_ones():
    """Also not as a rounding error: they may hold anything."""
    attend = compile_linear(4, 40, "tokens")
    arrays, decay_tk = tokens(40), decays("tokens", 40)
    before, _ = attend(*arrays, decay_tk, jnp.int32(40))
    arrays[1][25], arrays[2][25], decay_tk[25] = 1e6, 1e6, 0.5
    after, _ = attend(*arrays, decay_tk, jnp.int32(40))
    np.testing.assert_array_equal(before[:25], after[:25])
    assert not np.array_equal(before[25], after[25])


def test_bfloat16_keeps_its_state_in_float32():
    arrays = [x.astype(jnp.bfloat16) for x in tokens(64)]
    decay_tk = decays("heads", 64)
    out, state = compile_linear(4, 64, "heads", dtype=jnp.bfloat16)(*arrays, decay_tk, jnp.int32(64))
    expected, last = recurrence(*(x.astype(np.float32) for x in arrays), decay_tk)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(state, last)
    assert_close(out.astype(np.float32), expected, rtol=4e-3)  # the result is rounded to 8 bits


def test_wrong_arguments_are_named():
    arrays = [jnp.asarray(x) for x in tokens(4)]
    with pytest.raises(ValueError, match="causal=False takes neither decay_tk nor state_khd"):
        linear_attention(*arrays, jnp.int32(4), decay_tk=jnp.ones((4, KV_HEADS)), causal=False)
