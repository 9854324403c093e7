"""Float32 logits and greedy tokens of every family and feature against `transformers`, from stored tensors.

`scripts/make_reference_tensors.py` made them; `test_live_transformers.py` checks that they are not stale.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import llama, weights
from jaxserve.models.batch import TokenBatch
from jaxserve.models.config import ModelConfig
from jaxserve.models.kv import KVPages, empty_pages
from jaxserve.models.registry import read_config
from tests.models import toy

BLOCK = 8
# Issue: 1e-4 relative to the logit scale. These logits have a deviation of about 3 and reach 10.
TOLERANCE = 1e-4


def load(case: str, folder: Path, length: int) -> tuple[ModelConfig, Any]:
    toy.write_checkpoint(folder, toy.CASES[case]["config"], toy.CASES[case]["seed"])
    cfg = read_config(folder)
    cfg = dataclasses.replace(cfg, rope=dataclasses.replace(cfg.rope, length=length))
    return cfg, weights.load(folder, llama.abstract(cfg), jnp.dtype("float32"))


@functools.partial(jax.jit, static_argnums=1, donate_argnums=3)
def run(params: Any, cfg: ModelConfig, batch: TokenBatch[Any], kv: KVPages[jax.Array]) -> tuple[jax.Array, Any]:
    hidden_te, kv, _ = llama.forward(params, cfg, batch, kv)
    return llama.logits(params, cfg, hidden_te), kv


def prefill(params: Any, cfg: ModelConfig, ids: list[int], chunk: int, *, exact_shape: bool = False) -> np.ndarray:
    """Logits of all positions, `chunk` tokens at a time, through shuffled pages."""
    width = -(-len(ids) // BLOCK)
    kv = empty_pages(cfg, width + 3, BLOCK, jnp.dtype("float32"))
    table_sm = np.random.default_rng(0).permutation(width + 3)[None, :width].astype(np.int32)
    parts = []
    for start in range(0, len(ids), chunk):
        piece = np.zeros(chunk if exact_shape else len(ids), np.int32)  # padded: one compilation serves all chunk sizes
        count = min(chunk, len(ids) - start)
        piece[:count] = ids[start : start + count]
        batch = TokenBatch(
            ids_t=piece,
            q_start_s=np.array([0, count], np.int32),
            kv_len_s=np.array([start + count], np.int32),
            table_sm=table_sm,
            max_q_len=1 if len(piece) == 1 else None,
        )
        logits_tv, kv = run(params, cfg, batch, kv)
        parts.append(np.asarray(logits_tv)[:count])
    return np.concatenate(parts)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("case", toy.CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path):
    golden = np.load(toy.golden_path(case))
    ids = golden["prompt_token_ids"].tolist()
    cfg, params = load(case, tmp_path, len(ids))
    scale = np.abs(golden["logits"]).max()
    for chunk in (len(ids), 7, 1):  # whole prompt, chunks that do not divide it, decode
        error = np.abs(prefill(params, cfg, ids, chunk) - golden["logits"]).max()
        assert error < TOLERANCE * scale, f"chunks of {chunk}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3", "qwen2_window"])
def test_many_step_sizes_give_the_same_logits(case: str, tmp_path: Path):
    golden = np.load(toy.golden_path(case))
    ids = golden["prompt_token_ids"].tolist()
    cfg, params = load(case, tmp_path, len(ids))
    scale = np.abs(golden["logits"]).max()
    for chunk in (1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, len(ids) - 1, len(ids)):  # each compiles its own step
        error = np.abs(prefill(params, cfg, ids, chunk, exact_shape=True) - golden["logits"]).max()
        assert error < TOLERANCE * scale, f"chunks of {chunk}: {error}"


def test_dynamic_rope_follows_the_served_length(tmp_path: Path):
    """Frequencies come from the longest sequence served, so the same model served longer gives other logits."""
    golden = np.load(toy.golden_path("llama_dynamic"))
    ids = golden["prompt_token_ids"].tolist()
    cfg, params = load("llama_dynamic", tmp_path, 4 * len(ids))
    assert np.abs(prefill(params, cfg, ids, len(ids)) - golden["logits"]).max() > 0.1


@pytest.mark.parametrize("case", ["llama3", "qwen2_window"])
def test_hidden_states_of_last_tokens_alone_are_the_same(case: str, tmp_path: Path):
    cfg, params = load(case, tmp_path, 16)
    batch = TokenBatch(
        ids_t=np.arange(16, dtype=np.int32),
        q_start_s=np.array([0, 5, 6, 6, 12], np.int32),  # a chunk, a decode, an empty row, a chunk, and padding
        kv_len_s=np.array([5, 1, 0, 6], np.int32),
        table_sm=np.arange(4, dtype=np.int32)[:, None],
    )

    @jax.jit
    def hidden(needs_all: jax.Array | None) -> jax.Array:
        kv = empty_pages(cfg, 4, BLOCK, jnp.dtype("float32"))
        return llama.forward(params, cfg, jax.tree.map(jnp.asarray, batch), kv, None, needs_all)[0]

    every, ends = hidden(None), np.array([4, 5, 11])
    np.testing.assert_array_equal(hidden(jnp.array(True)), every)
    np.testing.assert_allclose(hidden(jnp.array(False))[ends], every[ends], atol=1e-5)
    assert not np.delete(hidden(jnp.array(False)), ends, axis=0).any()
