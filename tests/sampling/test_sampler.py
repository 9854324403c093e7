"""Sampling against NumPy's plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.request import MAX_BANNED
from jaxserve.sampling import sampler
from jaxserve.sampling.logits import IN_PROMPT, ban, keep_top, penalise

VOCAB = 700  # more than one block of the cumulative sum


def random_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)


def inputs(rows: int, **changes) -> sampler.SamplingInputs:
    def full(value: float, dtype: type) -> np.ndarray:
        return np.full(rows, value, dtype)

    plain = {
        "slot_s": np.arange(rows, dtype=np.int32),
        "temperature_s": full(0, np.float32),
        "top_k_s": full(0, np.int32),
        "top_p_s": full(1, np.float32),
        "min_p_s": full(0, np.float32),
        "presence_s": full(0, np.float32),
        "frequency_s": full(0, np.float32),
        "repetition_s": full(1, np.float32),
        "seed_s": full(0, np.uint32),
        "index_s": full(0, np.int32),
        "is_edited_s": full(0, np.bool_),
        "banned_sb": np.full((rows, MAX_BANNED), VOCAB, np.int32),
        "is_masked_s": full(0, np.bool_),
    }
    wanted = plain | changes
    asks = sampler.Asks(
        edits=np.any(wanted["is_edited_s"]),
        bans=np.any(wanted["banned_sb"] < VOCAB),
        masks=np.any(wanted["is_masked_s"]),
        draws=np.any(wanted["temperature_s"] > 0),
        top_k=np.any(wanted["top_k_s"] > 0),
        top_p=np.any(wanted["top_p_s"] < 1),
        min_p=np.any(wanted["min_p_s"] > 0),
        logprobs=np.bool_(False),
    )
    return sampler.SamplingInputs(**wanted, asks=asks)


def expected_kept(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    order = [i for i in np.argsort(-weights, kind="stable") if weights[i] >= min_p]
    order = order[:top_k] if top_k else order
    if top_p < 1:
        mass = np.cumsum(weights[order]) / weights[order].sum()
        order = order[: int(np.searchsorted(mass, top_p)) + 1]
    return set(map(int, order))


@pytest.mark.parametrize("seed", range(4))
def test_top_k_top_p_and_min_p_keep_what_sorting_keeps(seed: int):
    cases = [(0, 1.0, 0.0), (1, 1.0, 0.0), (17, 1.0, 0.0), (0, 0.5, 0.0), (0, 0.999, 0.0), (0, 1e-6, 0.0)]
    cases += [(0, 1.0, 0.05), (40, 0.8, 0.01), (VOCAB, 0.9, 0.0), (5, 0.3, 0.5)]
    logits = random_logits(len(cases), seed)
    k, p, m = (np.array(column) for column in zip(*cases, strict=True))
    kept = np.asarray(
        keep_top(
            jnp.asarray(logits),
            jnp.asarray(k, jnp.int32),
            jnp.asarray(p, jnp.float32),
            jnp.asarray(m, jnp.float32),
            jnp.array(True),
            jnp.array(True),
        )
    )
    for row, case in enumerate(cases):
        assert set(np.flatnonzero(np.isfinite(kept[row])).tolist()) == expected_kept(logits[row], *case), case


def test_ties_at_the_edge_are_all_kept():
    logits = jnp.asarray([[1.0, 3.0, 3.0, 3.0, 0.0]])
    kept = keep_top(logits, jnp.asarray([2]), jnp.asarray([1.0]), jnp.asarray([0.0]), jnp.array(True), jnp.array(False))
    assert np.isfinite(np.asarray(kept))[0].tolist() == [False, True, True, True, False]


def test_penalties_follow_the_formulas():
    logits = jnp.asarray([[2.0, -2.0, 1.0, 0.5]])
    counts = jnp.asarray([[IN_PROMPT, 3, IN_PROMPT + 1, 0]], jnp.int32)
    out = penalise(logits, counts, jnp.asarray([2.0]), jnp.asarray([0.1]), jnp.asarray([0.5]))
    np.testing.assert_allclose(out, [[1.0, -4.0 - 0.3 - 0.5, 0.5 - 0.1 - 0.5, 0.5]], rtol=1e-6)


def test_banned_tokens_are_minus_infinity_and_padding_is_ignored():
    out = np.asarray(ban(jnp.zeros((2, 4)), jnp.asarray([[1, 4], [4, 4]])))
    assert out.tolist() == [[0.0, -np.inf, 0.0, 0.0], [0.0] * 4]


def test_frequencies_of_draws_follow_the_probabilities():
    rows = 4096
    logits = np.tile(np.linspace(0, 4, 6, dtype=np.float32), (rows, 1))
    drawn, _, _ = jax.jit(sampler.sample)(
        jnp.asarray(logits),
        sampler.empty_state(rows, 6),
        inputs(
            rows,
            temperature_s=np.full(rows, 2.0, np.float32),
            seed_s=np.arange(rows, dtype=np.uint32),
            banned_sb=np.full((rows, MAX_BANNED), 6, np.int32),
        ),
    )
    weights = np.exp(logits[0] / 2)
    expected = weights / weights.sum()
    observed = np.bincount(np.asarray(drawn), minlength=6) / rows
    error = np.sqrt(expected * (1 - expected) / rows)
    assert (np.abs(observed - expected) < 4.5 * error).all(), (observed, expected)


def test_a_draw_never_lands_on_a_token_without_probability():
    logits = np.full((64, VOCAB), -np.inf, np.float32)
    logits[:, [3, 513, 699]] = 0.0
    for temperature in (1e-6, 1.0, 1e6):
        drawn, _, _ = sampler.sample(
            jnp.asarray(logits),
            sampler.empty_state(64, VOCAB),
            inputs(64, temperature_s=np.full(64, temperature, np.float32), seed_s=np.arange(64, dtype=np.uint32)),
        )
        assert set(np.asarray(drawn).tolist()) <= {3, 513, 699}


def test_history_is_kept_by_slot_and_cleared_when_a_slot_starts():
    state = sampler.empty_state(3, VOCAB)

    def start(
        state, slot: int, prompt: list[int], answer: list[int], floor: float, bias: dict[int, float], first: bool
    ):
        pad = lambda ids: jnp.asarray(ids + [VOCAB] * (4 - len(ids)), jnp.int32)  # noqa: E731
        values = jnp.asarray([*bias.values(), *[0.0] * (4 - len(bias))], jnp.float32)
        args = (
            jnp.int32(slot),
            jnp.bool_(first),
            jnp.float32(floor),
            pad(prompt),
            pad(answer),
            pad(list(bias)),
            values,
        )
        return sampler.start_slot(state, *args)

    state = start(state, 1, [5, 5, 6], [7, 7], -np.inf, {2: 0.0}, first=True)
    state = start(state, 1, [8], [7], -np.inf, {9: 1.5}, first=False)
    counts = np.asarray(state.counts_rv)
    assert counts[1, [5, 6, 7, 8]].tolist() == [IN_PROMPT, IN_PROMPT, 3, IN_PROMPT]
    assert np.flatnonzero(np.isfinite(np.asarray(state.bias_rv)[1])).tolist() == [2, 9]
    assert not counts[[0, 2]].any()
    state = start(state, 1, [], [], 0.0, {}, first=True)
    assert not np.asarray(state.counts_rv).any()
    assert not np.asarray(state.bias_rv).any()


def test_logprobs_ranks_and_alternatives():
    logits = random_logits(3)
    token = np.array([4, int(logits[1].argmax()), 600])
    found = sampler.logprobs_of(jnp.asarray(logits), jnp.asarray(token))
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    np.testing.assert_allclose(found.token, exact[np.arange(3), token], atol=1e-5)
    assert np.asarray(found.rank).tolist() == [int((logits[i] > logits[i, t]).sum()) + 1 for i, t in enumerate(token)]
    np.testing.assert_array_equal(np.asarray(found.top_ids)[:, 0], logits.argmax(1))
    np.testing.assert_allclose(np.asarray(found.top), -np.sort(-exact, axis=1)[:, :20], atol=1e-5)


@pytest.mark.parametrize("wanted", [0, 1, 64, 65, 150])
def test_prompt_logprobs_in_chunks_equal_the_whole(wanted: int):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(150, 8)).astype(np.float32), rng.normal(size=(VOCAB, 8)).astype(np.float32)
    index, target = rng.permutation(150).astype(np.int32), rng.integers(0, VOCAB, 150).astype(np.int32)
    found = sampler.prompt_logprobs(
        lambda x: x @ jnp.asarray(head).T,
        jnp.asarray(hidden),
        jnp.asarray(index),
        jnp.asarray(target),
        jnp.int32(wanted),
    )
    logits = (hidden @ head.T).astype(np.float64)
    exact = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(np.asarray(found.token)[:wanted], exact[index, target][:wanted], atol=1e-4)
