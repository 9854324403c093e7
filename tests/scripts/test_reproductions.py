"""Reproductions, small: the directions that the papers claim."""

import dataclasses
import random
import sys
from pathlib import Path

import pytest

from jaxserve.workload.generate import documents

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from reproductions import batchllm, dlpm, sarathi, vtc


def test_groups_are_faster_than_a_shuffled_job_and_compute_less():
    job = documents(random.Random(0), count=5, questions=6).calls
    shuffled, grouped = (batchllm.run_job(job, batchllm.WAYS[name], 8_000) for name in (batchllm.BASE, batchllm.BEST))
    assert shuffled.seconds > 1.5 * grouped.seconds
    assert grouped.cached_share > 0.7 > shuffled.cached_share
    careful = dataclasses.replace(batchllm.WAYS[batchllm.BEST], options={"future_share": 1.0})
    assert batchllm.run_job(job, careful, 8_000).preemptions == 0


@pytest.mark.parametrize("name", [sarathi.FIRST, sarathi.WHOLE])
def test_chunks_keep_the_time_between_tokens_short(name):
    whole, chunked = (sarathi.serve(sarathi.MODES[mode], 4.0, 60, seed=0) for mode in (name, "chunks, 512 a step"))
    assert whole["calls_ended"] == chunked["calls_ended"] == 60
    assert whole["output_tokens"] == chunked["output_tokens"]
    assert whole["tbt_s"]["p99"] > 3 * chunked["tbt_s"]["p99"]


def test_dlpm_is_faster_than_vtc_and_as_fair():
    base, found = (dlpm.serve(*dlpm.POLICIES[name], 20.0, seed=0) for name in (dlpm.VTC, "dlpm Q=500"))
    assert found["requests_per_s"] > 1.6 * base["requests_per_s"]
    assert found["fairness"]["worst_gap"] < base["fairness"]["worst_gap"]


def test_vtc_keeps_the_bound_that_first_come_first_served_breaks_in_time():
    first, fair = (vtc.serve(name, vtc.UNEQUAL, 90.0, seed=0) for name in ("fcfs", "vtc, strict"))
    assert fair["fairness"]["worst_gap"] < vtc.BOUND < first["fairness"]["worst_gap"]
