"""What callers are told of a step that failed."""

import logging

import pytest

from jaxserve.executor.failure import explain
from jaxserve.step import Row, Seat, StepPlan

PLAN = StepPlan(index=7, rows=(Row(Seat(seq_id="s", slot=0), start=0, token_ids=(1, 2, 3)),))


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: no room\nbuffer table " + "x" * 9999)],
    ids=["host", "xla"],
)
def test_want_of_memory_names_the_options_that_help(error, caplog):
    text = str(explain(error, PLAN))
    assert text.startswith("a step of 3 tokens in 1 sequences ran out of device memory (")
    assert "Lower memory_utilization (or num_kv_blocks), max_num_batched_tokens or max_num_seqs." in text
    assert len(text) < 400
    assert not caplog.records


def test_any_other_failure_is_named_and_its_trace_logged(caplog):
    with caplog.at_level(logging.ERROR):
        text = str(explain(KeyError("rung"), PLAN))
    assert text.startswith("a step of 3 tokens in 1 sequences failed (KeyError: 'rung').")
    assert caplog.records[0].exc_info
