"""Figures of a run, against what can be reckoned by hand."""

import json

import numpy as np
import pytest

from jaxserve.sim.record import Record
from jaxserve.sim.report import Slo, report, spread
from jaxserve.sim.run import simulate
from jaxserve.sim.table import table, time_text
from jaxserve.workload.call import Span
from jaxserve.workload.generate import generate
from tests.sim.rigs import call, spec, work


def test_figures_of_one_call():
    """16 prompt tokens take 16 ms, each later token 1 ms."""
    facts = report(simulate(work(call("a", 16, 5, program="p")), [spec()]))
    assert facts["ttft_s"]["p50"] == pytest.approx(0.016)
    assert facts["tpot_s"]["mean"] == facts["tbt_s"]["p99"] == pytest.approx(0.001)
    assert facts["latency_s"]["max"] == facts["program_latency_s"]["max"] == pytest.approx(0.020)
    assert facts["program_s_per_token"]["mean"] == pytest.approx(0.020 / 5)
    assert facts["utilisation"] == [pytest.approx(1.0)]
    assert (facts["calls_ended"], facts["output_tokens"], facts["padding_share"]) == (1, 5, 0.0)
    assert "slo" not in facts and "fairness" not in facts and "deadlines" not in facts


def test_a_program_is_measured_along_its_longest_way():
    calls = [call("a", 16, 2), call("b", 16, 9), call("c", 16, 3, parents=("a", "b"))]
    run = simulate(
        work(*(call(c.call_id, 16, c.output_tokens, parents=c.parents, program="p") for c in calls)), [spec()]
    )
    facts = report(run)
    assert facts["program_s_per_token"]["mean"] == pytest.approx(facts["program_latency_s"]["mean"] / 12)


def test_percentiles_of_gaps_count_tokens():
    """As if each gap were listed."""
    run = simulate(
        generate("sharegpt", count=12, rate=10.0, options={"prompt": 40, "answer": ["even", 2, 60]}), [spec()]
    )
    every = np.repeat(np.array(run.gaps.seconds), np.array(run.gaps.counts))
    assert every.size == sum(record.num_output - 1 for record in run.records)
    facts = report(run)["tbt_s"]
    assert facts["mean"] == pytest.approx(every.mean())
    for level in (50, 90, 99):
        assert facts[f"p{level}"] == np.percentile(every, level, method="inverted_cdf")
    assert max(record.worst_s for record in run.records) == facts["max"]


def test_an_slo_counts_calls_that_keep_all_of_it():
    slo = Slo(ttft_s=1.0, tpot_s=0.1, tbt_s=0.5)

    def record(ttft_s: float, tokens: int, last_s: float, worst_s: float, *, ended: bool = True) -> Record:
        made = Record(call("a"), 10.0, 16)
        made.first_s, made.num_output, made.last_s, made.worst_s = 10 + ttft_s, tokens, 10 + last_s, worst_s
        made.finish_s = made.last_s if ended else None
        return made

    assert slo.holds(record(1.0, 11, 2.0, 0.5))
    assert not slo.holds(record(1.1, 11, 2.0, 0.5))
    assert not slo.holds(record(1.0, 10, 2.0, 0.5))
    assert not slo.holds(record(1.0, 11, 2.0, 0.6))
    assert not slo.holds(record(1.0, 11, 2.0, 0.5, ended=False))
    assert slo.holds(record(0.5, 1, 0.5, 0.0)), "one token has no time per token"


def test_goodput_and_deadlines():
    calls = [call(str(n), 64, 4, arrival_s=5.0, program=f"p{n}", deadline_s=0.1) for n in range(4)]
    facts = report(simulate(work(*calls), [spec(max_num_seqs=1)]), Slo(ttft_s=0.1))
    assert facts["slo"]["share"] == facts["deadlines"]["share"] == 0.25
    assert facts["slo"]["goodput_per_s"] == pytest.approx(1 / facts["end_s"])


def test_service_and_its_gap():
    """One slot; b's two calls wait while a's eight run, then there is nobody left to compare with."""
    calls = [call(f"a{n}", 16, 2, client="a") for n in range(8)] + [call(f"b{n}", 16, 2, client="b") for n in range(2)]
    run = simulate(work(*calls), [spec(max_num_seqs=1)])
    facts = report(run)["fairness"]
    assert facts["service"] == {"a": 8 * (16 + 4), "b": 2 * (16 + 4)}
    assert facts["jain"] == pytest.approx((160 + 40) ** 2 / (2 * (160**2 + 40**2)))
    assert facts["worst_gap"] == pytest.approx(7 * 20, abs=20), "as long as a call of both waits"
    assert facts["clients"]["b"]["calls_ended"] == 2
    alone = [
        call(f"{name}{n}", 16, 2, client=name, arrival_s=at) for name, at in (("a", 0.0), ("b", 9.0)) for n in (0, 1)
    ]
    assert report(simulate(work(*alone), [spec(max_num_seqs=1)]))["fairness"]["worst_gap"] == 0.0


def test_cached_prompt_tokens_are_counted():
    calls = [call(str(n), (Span(1, 64), Span(2 + n, 8)), 2, arrival_s=float(n)) for n in range(4)]
    facts = report(simulate(work(*calls), [spec()]))
    assert facts["cached_share"] == pytest.approx(3 * 64 / (4 * 72))


def test_a_report_is_json_and_a_table():
    runs = {
        name: simulate(generate("tenants", count=9, rate=9.0, options={"document": 30}), [spec()], name)
        for name in ("fcfs", "priority")
    }
    reports = {name: report(run, Slo(ttft_s=1.0)) for name, run in runs.items()}
    assert json.loads(json.dumps(reports)) == reports
    lines = table(reports).splitlines()
    assert lines[0].split() == ["fcfs", "priority"]
    assert len({len(line) for line in lines if line.endswith("%")}) == 1, "columns stand below each other"
    assert any(line.startswith("worst gap of service") for line in lines)
    assert not any(line.startswith("swapped") for line in lines), "nothing to say"


def test_nothing_ended_is_a_report_too():
    facts = report(simulate(work(call("a", 999)), [spec()]))
    assert (facts["calls_refused"], facts["ttft_s"], facts["tbt_s"]) == (1, {}, {})
    assert "-" in table({"fcfs": facts | {"ttft_s": {}}}) or "first token" not in table({"fcfs": facts})


def test_units():
    assert [time_text(s) for s in (5e-6, 0.0123, 0.123, 1.234, 12.34, 123.4)] == [
        "5 us",
        "12.3 ms",
        "123 ms",
        "1.23 s",
        "12.3 s",
        "123 s",
    ]
    assert spread([]) == {}
