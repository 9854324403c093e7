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


def test_a_prompt_alone_takes_the_rung_with_a_scheme():
    ladder = build_ladder(4, 256, 4, scheme_of=lambda tokens: "ring" if tokens >= 64 else None)
    assert [rung.scheme for rung in ladder if rung.scheme] == ["ring", "ring"]
    assert fit(ladder, [Load(100, 1, is_prompt=True)]).scheme == "ring"
    assert fit(ladder, [Load(100, 1, is_prompt=True), Load(1, 1)]).scheme is None, "another replica decodes"
    assert fit(ladder, [Load(10, 1, is_prompt=True)]).scheme is None, "too short"
    assert fit(ladder, [Load(100, 1)]).scheme is None, "not from its beginning"


def test_devices_share_every_rung_evenly():
    ladder = build_ladder(5, 100, 4)
    assert all(rung.tokens % 4 == 0 for rung in ladder)
    assert fit(ladder, [Load(5, 5)]).decode_only
    assert fit(ladder, [Load(100, 5)]).tokens == 100
