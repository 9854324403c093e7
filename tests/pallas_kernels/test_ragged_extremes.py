"""Random rows, most of them extreme, over every head size and page size: hundreds of cases, in a few compiled programs.

Blocks are cut small, so that short rows already have several chunks and prompts several tiles.
"""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxserve.pallas_kernels import interpreter
from jaxserve.pallas_kernels.ragged_paged_attention import cpu, tuned, xla
from jaxserve.pallas_kernels.ragged_paged_attention.cases import Case, ragged, ragged_moulds
from jaxserve.pallas_kernels.ragged_paged_attention.comparison import program
from tests.pallas_kernels.attention import BACKENDS, assert_equals_the_formula, refuses

MOULDS = ragged_moulds()
SEEDS = {"tpu": range(5)}  # interpreted; others six
# Interpreted kernels take seconds to compile: every head size with two page sizes, and so all page sizes.
MADE = {"tpu": [name for i, name in enumerate(MOULDS) if (i + i // 4) % 2 == 0]}
# As fast tests, a mould of each head size.
FAST = [(name, 0, impl) for name in list(MOULDS)[::5] for impl in BACKENDS]
ALL = [
    (name, seed, impl)
    for name in MOULDS
    for impl in BACKENDS
    for seed in SEEDS.get(impl, range(6))
    if name in MADE.get(impl, MOULDS)
]


@functools.cache
def compiled(*what):
    """Shared by all tests of this file, which all cut blocks alike."""
    return program(*what)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(interpreter, "PARAMS", pltpu.InterpretParams(detect_races=True))
    monkeypatch.setattr(tuned, "query_tile", lambda: 16)
    monkeypatch.setattr(tuned, "chunk", lambda token_bytes, is_decode: 128)
    monkeypatch.setattr(tuned, "block", lambda num_queries, is_decode: num_queries // 2 or 1)
    for name in ("DECODE_CHUNK", "TILE_CHUNK"):
        monkeypatch.setattr(xla, name, 64)
    monkeypatch.setattr(xla, "QUERY_TILE", 16)
    monkeypatch.setattr(xla, "ROWS", 4)


def case_of(name: str, seed: int, impl: str) -> Case:
    """Every fourth mould is decodes only. Pools that an implementation refuses are replaced by the model's own type."""
    mould, index = MOULDS[name], list(MOULDS).index(name)
    if refuses(impl, mould):
        mould = dataclasses.replace(mould, kv_dtype=None)
    only_decodes = index % 4 == 3
    draws = (ragged(mould, 1000 * index + 100 * retry + seed, only_decodes=only_decodes) for retry in itertools.count())
    return next(case for case in draws if (case.max_q_len == 1) == only_decodes)  # the same program for all seeds


@pytest.mark.parametrize(
    ("name", "seed", "impl"), [*FAST, *(pytest.param(*one, marks=pytest.mark.slow) for one in ALL if one not in FAST)]
)
def test_equals_the_formula(name: str, seed: int, impl: str, native_folder, capfd: pytest.CaptureFixture[str]):
    case = case_of(name, seed, impl)
    dtype = jnp.dtype(case.dtype)
    if impl == "cpu" and (reason := cpu.refusal(dtype, dtype, case.head_size)):
        pytest.skip(reason)
    assert_equals_the_formula(case, impl, seed, compiled)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_draws_of_a_mould_have_the_same_shapes_and_all_extremes():
    for name, mould in MOULDS.items():
        cases = [ragged(mould, seed) for seed in range(60)]
        assert len({(case.num_tokens, len(case.rows), case.num_pages) for case in cases}) == 1, name
        rows = {row for case in cases for row in case.rows}
        lengths = {length for length, _ in rows}
        assert {0, 1, 256} <= lengths
        assert {length % mould.page_size for length in lengths} >= {0, 1}
        assert any(length == queries > 1 for length, queries in rows), "no whole prompt"
        assert any(length > queries > 1 for length, queries in rows), "no chunk"
