"""Attention of one block over another: against the formula, and that what nobody sees is not computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.sharding.block import KEYS, QUERIES, Mask, attend
from jaxserve.sharding.merge import EMPTY
from tests.sharding.dense import dense, prompt

TOKENS = 2 * KEYS + 40


@functools.partial(jax.jit, static_argnames=("causal", "window"))
def whole(q_tnh, k_tkh, v_tkh, length, causal=True, window=None):
    position = jnp.arange(len(q_tnh))
    return attend(q_tnh, k_tkh, v_tkh, position, position, Mask(length, causal, window), scale=0.25, run=len(q_tnh))


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 70)])
def test_equals_dense_over_several_tiles(causal, window):
    arrays = prompt(TOKENS, 4, 2, 8)
    for length in (TOKENS, KEYS + 3):
        done = whole(*arrays, jnp.int32(length), causal=causal, window=window)
        expected = dense(*arrays, length, scale=0.25, causal=causal, window=window)
        np.testing.assert_allclose(done.out_tnh[:length], expected[:length], rtol=0, atol=1e-6)


def test_bfloat16_is_summed_in_float32():
    arrays = [x.astype(jnp.bfloat16) for x in prompt(TOKENS, 4, 2, 8)]
    done = whole(*map(jnp.asarray, arrays), jnp.int32(TOKENS))
    expected = dense(*(x.astype(np.float32) for x in arrays), TOKENS, scale=0.25)
    assert done.out_tnh.dtype == jnp.float32
    np.testing.assert_allclose(done.out_tnh, expected, rtol=0, atol=2e-2)  # weights are rounded to 8 bits: 2 ** -9 each


def test_tiles_that_nobody_sees_are_skipped():
    """They hold nan, which would show if they were multiplied, even by zero."""
    q_tnh, k_tkh, v_tkh = prompt(2 * KEYS, 4, 2, 8)
    poisoned = v_tkh.copy()
    poisoned[KEYS:] = np.nan
    clean, dirty = (whole(q_tnh, k_tkh, v, jnp.int32(2 * KEYS)).out_tnh for v in (v_tkh, poisoned))
    np.testing.assert_array_equal(clean[:KEYS], dirty[:KEYS])
    assert np.isnan(dirty[-1]).all()


def test_padding_is_not_read():
    q_tnh, k_tkh, v_tkh = prompt(KEYS, 4, 2, 8)
    length = QUERIES + 5
    clean = whole(q_tnh, k_tkh, v_tkh, jnp.int32(length))
    for x in (q_tnh, k_tkh, v_tkh):
        x[length:] = np.nan
    dirty = whole(q_tnh, k_tkh, v_tkh, jnp.int32(length))
    np.testing.assert_array_equal(clean.out_tnh[:length], dirty.out_tnh[:length])


def test_queries_that_see_nothing_have_nothing():
    arrays = map(jnp.asarray, prompt(16, 4, 2, 8))
    position = jnp.arange(16)
    done = attend(*arrays, position, position + 10, Mask(jnp.int32(26), True, None), scale=0.25, run=16)
    assert not done.out_tnh[:10].any() and (done.lse_tn[:10] == EMPTY).all()
    assert (done.lse_tn[10:] > EMPTY).all()
