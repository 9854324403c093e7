"""What the compiled step is made of."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.errors import DeviceError
from jaxserve.executor.inputs import empty_inputs
from jaxserve.executor.ladder import Rung
from jaxserve.executor.local import LocalExecutor
from jaxserve.executor.program import DeviceState, run_step
from jaxserve.models import weights
from jaxserve.models.config import from_hf
from jaxserve.models.kv import empty_pages
from jaxserve.models.registry import family_of
from jaxserve.pallas_kernels.ragged_paged_attention import cpu
from jaxserve.sampling.sampler import empty_state
from jaxserve.step import Row, Seat, StepPlan
from tests.models import toy

SLOTS, BLOCKS, BLOCK_SIZE = 4, 977, 8  # a prime number of blocks: its pages are easy to find in the program


@pytest.mark.parametrize("backend", ["xla", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rung", [Rung(4, 4, True), Rung(16, 4, False)], ids=["decode", "mixed"])
def test_no_step_copies_the_pool(rung: Rung, dtype: str, backend: str, native_folder: Path):
    """A second user of the donated pool would make XLA copy all of it in every layer."""
    if backend == "cpu" and (reason := cpu.refusal(jnp.dtype(dtype), jnp.dtype(dtype), 64)):
        pytest.skip(reason)
    cfg = from_hf(toy.CASES["llama3"]["config"])
    family = family_of(cfg)
    params = weights.random(family.abstract(cfg), jnp.dtype(dtype), 0)
    kv = empty_pages(cfg, BLOCKS, BLOCK_SIZE, jnp.dtype(dtype), as_bits=True)
    state = DeviceState(kv, empty_state(SLOTS, cfg.vocab_size))
    inputs = empty_inputs(rung, table_width=8, num_slots=SLOTS, vocab_size=cfg.vocab_size)
    step = jax.jit(functools.partial(run_step, family, cfg, backend), donate_argnums=1)
    compiled = step.lower(params, state, inputs).compile()
    pages = BLOCKS * cfg.num_layers
    whole_pool = rf"= \w+\[(?:{pages},{cfg.num_kv_heads}|{pages * cfg.num_kv_heads}),[\d,]+\]\S* (copy|convert)\("
    found = re.findall(whole_pool, compiled.as_text())
    assert not found, f"the step copies the pool {len(found)} times"
    pool_bytes = kv.pages_pkbd.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < pool_bytes / 2
    assert compiled.memory_analysis().alias_size_in_bytes >= pool_bytes


def test_a_plan_that_points_outside_of_the_pool_is_refused_before_it_runs_when_checks_are_on():
    cfg = from_hf(toy.CASES["llama3"]["config"])
    executor = LocalExecutor(
        family_of(cfg),
        cfg,
        params=None,  # nothing is compiled, so nothing can run
        empty_state=lambda: DeviceState(
            empty_pages(cfg, BLOCKS, BLOCK_SIZE, jnp.dtype("float32")), empty_state(SLOTS, cfg.vocab_size)
        ),
        ladder=(Rung(16, 4, False),),
        max_model_len=64,
        attention_backend=None,
    )

    def plan(block: int) -> StepPlan:
        row = Row(Seat(seq_id="s", slot=0), start=8, token_ids=(1, 2, 3), blocks=(0, block))
        return StepPlan(index=0, rows=(row,))

    with jax.enable_checks(True):
        with pytest.raises(ValueError, match=f"table_sm: row 0, column 1 is page {BLOCKS}"):
            executor.dispatch(plan(BLOCKS))
        with pytest.raises(DeviceError, match="KeyError"):  # goes on to the step, which was never compiled
            executor.dispatch(plan(BLOCKS - 1))
