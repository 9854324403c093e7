"""What a step is given: every replica's rows in a part of their own."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.executor.inputs import empty_inputs, make_inputs, places
from jaxserve.executor.ladder import Rung
from jaxserve.request import SamplingParams
from jaxserve.step import Row, Seat, StepPlan

RUNG = Rung(16, 4, False)
SIZES: dict[str, Any] = {"table_width": 5, "num_slots": 6, "vocab_size": 50}
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_k=3, top_p=0.5, min_p=0.1),
    SamplingParams(logprobs=2, frequency_penalty=0.5),
]


@st.composite
def rows(draw, replica: int):
    tokens = tuple(draw(st.lists(st.integers(0, 49), max_size=3)))
    feeds_last = not tokens or draw(st.booleans())
    count = len(tokens) + feeds_last
    targets = st.lists(st.integers(-1, 49), min_size=count, max_size=count).map(tuple)
    return Row(
        seat=Seat(
            seq_id="s",
            epoch=0,
            replica=replica,
            slot=draw(st.integers(0, 5)),
            params=draw(st.sampled_from(PARAMS)),
            seed=draw(st.integers(0, 2**32 - 1)),
        ),
        start=draw(st.integers(0, 30)),
        token_ids=tokens,
        feeds_last=feeds_last,
        blocks=tuple(draw(st.lists(st.integers(0, 99), max_size=5))),
        samples=draw(st.booleans()),
        output_index=draw(st.integers(0, 9)),
        banned=tuple(draw(st.lists(st.integers(0, 49), max_size=3))),
        logprob_targets=draw(st.none() | targets),
    )


@st.composite
def plans(draw, num_replicas: int):
    """Rows of all replicas, mixed as no scheduler would, but as the contract allows."""
    found = [row for replica in range(num_replicas) for row in draw(st.lists(rows(replica), max_size=4))]
    return StepPlan(index=1, rows=tuple(draw(st.permutations(found))))


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
@given(data=st.data())
def test_each_part_is_what_its_replica_would_get_alone(num_replicas: int, data):
    plan = data.draw(plans(num_replicas))
    joined = make_inputs(plan, RUNG, **SIZES, num_replicas=num_replicas)
    alone = []
    for replica in range(num_replicas):
        own = tuple(
            row._replace(seat=dataclasses.replace(row.seat, replica=0)) for row in plan.rows if row.replica == replica
        )
        alone.append(make_inputs(StepPlan(index=1, rows=own), RUNG, **SIZES))

    def check(whole: np.ndarray, *parts: np.ndarray) -> None:
        assert whole.dtype == parts[0].dtype
        if whole.ndim:
            np.testing.assert_array_equal(whole, np.concatenate(parts))

    jax.tree.map(check, joined, *alone)
    assert joined.num_wanted == max(part.num_wanted for part in alone)
    for field in dataclasses.fields(joined.sampling.asks):
        asked = [getattr(part.sampling.asks, field.name) for part in alone]
        assert getattr(joined.sampling.asks, field.name) == any(asked), field.name


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
@given(data=st.data())
def test_every_row_is_found_again(num_replicas: int, data):
    plan = data.draw(plans(num_replicas))
    inputs = make_inputs(plan, RUNG, **SIZES, num_replicas=num_replicas)
    found = places(plan, RUNG)
    assert len({place.row for place in found}) == len(found) == len(plan.rows)
    for row, place in zip(plan.rows, found, strict=True):
        part, index = divmod(place.row, RUNG.rows)
        assert part == row.replica
        begin, end = inputs.batch.q_start_s[part * (RUNG.rows + 1) + index :][:2]
        assert end - begin == row.num_tokens
        tokens = slice(part * RUNG.tokens + begin, part * RUNG.tokens + end)
        assert tuple(inputs.batch.ids_t[tokens][: len(row.token_ids)]) == row.token_ids
        fed = [row.slot if row.feeds_last and i == row.num_tokens - 1 else 6 for i in range(row.num_tokens)]
        assert inputs.feed_t[tokens].tolist() == fed
        assert inputs.batch.kv_len_s[place.row] == row.start + row.num_tokens
        assert tuple(inputs.batch.table_sm[place.row, : len(row.blocks)]) == row.blocks
        assert inputs.sampling.slot_s[place.row] == (row.slot if row.samples else 6)
        assert inputs.sampling.seed_s[place.row] == row.seat.seed
        assert inputs.sampling.temperature_s[place.row] == np.float32(row.params.temperature * row.samples)
        assert tuple(inputs.sampling.banned_sb[place.row, : len(row.banned)]) == row.banned
        wanted = [(i, target) for i, target in enumerate(row.logprob_targets or ()) if target >= 0]
        for offset, (token, target) in enumerate(wanted):
            assert place.score // RUNG.tokens == part
            assert inputs.target_t[place.score + offset] == target
            assert inputs.wanted_t[place.score + offset] == begin + token
    assert (inputs.batch.kv_len_s > 0).sum() == len(plan.rows)
    assert (inputs.feed_t < 6).sum() == sum(row.feeds_last for row in plan.rows)


def test_without_rows_every_part_is_padding():
    inputs = empty_inputs(RUNG, **SIZES, num_replicas=3)
    assert inputs.batch.ids_t.shape == inputs.feed_t.shape == inputs.wanted_t.shape == (3 * 16,)
    assert inputs.batch.q_start_s.shape == (3 * 5,)
    assert inputs.batch.table_sm.shape == (3 * 4, 5)
    assert inputs.num_wanted.shape == inputs.sampling.asks.draws.shape == ()
    assert not inputs.batch.q_start_s.any()
    assert (inputs.sampling.slot_s == 6).all()
