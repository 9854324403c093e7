"""The shapes that are compiled."""

import pytest

from jaxserve.executor.ladder import build_ladder, fit
from jaxserve.step import Load


@pytest.mark.parametrize("seqs", [1, 3, 8, 32, 100])
@pytest.mark.parametrize("budget", [1, 16, 100, 512, 2048])
def test_every_possible_step_has_a_rung(seqs: int, budget: int):
    ladder = build_ladder(seqs, budget)
    for tokens in range(1, max(seqs, budget) + 1):
        for rows in {1, min(tokens, seqs)}:
            rung = fit(ladder, [Load(tokens, rows)])
            assert rung.tokens >= tokens
            assert rung.rows >= rows
            assert not rung.decode_only or tokens == rows


def test_few_shapes_and_little_padding():
    ladder = build_ladder(32, 512)
    assert len(ladder) <= 12
    assert all(fit(ladder, [Load(n, n)]).tokens < 2 * n for n in range(1, 33))


def test_decodes_take_the_rung_without_the_prefill_path():
    assert fit(build_ladder(32, 512), [Load(7, 7)]).decode_only
    assert not fit(build_ladder(32, 512), [Load(7, 6)]).decode_only


def test_a_rung_holds_the_fullest_replica_in_tokens_and_in_rows():
    ladder = build_ladder(32, 512)
    assert fit(ladder, [Load(5, 5), Load(3, 3)]) == fit(ladder, [Load(5, 5)])
    assert fit(ladder, [Load(7, 7), Load(100, 1), Load(1, 1)]) == fit(ladder, [Load(100, 7)])
    # As many tokens as rows at most, but a prompt all the same.
    assert not fit(ladder, [Load(5, 1), Load(5, 5)]).decode_only
