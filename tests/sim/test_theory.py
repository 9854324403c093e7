"""The simulator against what others say: a queue's formula, and figures of an independent simulator."""

import pytest

from jaxserve.cost.roofline import reference
from jaxserve.sim.replica import ReplicaSpec
from jaxserve.sim.report import report
from jaxserve.sim.run import simulate
from jaxserve.workload.generate import generate
from tests.sim.rigs import spec


@pytest.mark.parametrize("load", [0.5, 0.95, 2.0])
def test_one_slot_is_a_queue_with_fixed_service(load):
    """Calls of one step of 16 ms wait until those before them are done (Lindley's recursion, 1952)."""
    calls = generate("sharegpt", count=500, rate=load / 0.016, options={"prompt": 16, "answer": 1})
    run = simulate(calls, [spec(max_num_seqs=1, caching=False)], knows_lengths=True)
    free_s = 0.0
    for record in run.records:
        assert record.start_s == pytest.approx(max(record.arrival_s, free_s))
        free_s = record.start_s + 0.016
        assert record.finish_s == pytest.approx(free_s)


@pytest.mark.parametrize(("budget", "p99_ms", "max_ms"), [(256, 28.8, 30.0), (512, 54.0, 58.0), (1024, 103.0, 112.0)])
def test_gaps_between_tokens_under_chunked_prefill(budget, p99_ms, max_ms):
    """Figures that were reckoned once by another program, for a dense 8B model on an A100 at 4 calls per second, with
    prompts of 1,100 tokens and answers of 181 (medians), and random numbers of its own."""
    here = ReplicaSpec(cost=reference(), num_blocks=12_500, max_num_seqs=128, token_budget=budget, max_model_len=16_384)
    gaps = report(simulate(generate("sharegpt", count=150, rate=4.0), [here]))["tbt_s"]
    assert 1e3 * gaps["p99"] == pytest.approx(p99_ms, rel=0.05)
    assert 1e3 * gaps["max"] == pytest.approx(max_ms, rel=0.1)
