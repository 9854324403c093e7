"""The search for block sizes: what it tries, and how it judges by a schedule."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import tune_kernels
from tuning import climb, schedule, timing

from benchmarks.kernels.scenario import Scenario
from jaxserve.pallas_kernels.ahead_of_time import has_compiler

CHIP = "TPU v5 lite"


def judge(cost, rules):
    """A pretend call that asks `rules` (question -> answer) and costs what `cost(answers)` says."""

    def judged(choices):
        answers = {question: choices.get(question, answer) for question, answer in rules.items()}
        return climb.Judged({"100": cost(answers)}, {(CHIP, question): value for question, value in answers.items()})

    return climb.Judge(judged, "schedule", "a model", {})


def test_a_number_is_followed_as_long_as_that_gains():
    found = list(climb.search(judge(lambda a: abs(a["chunk()"] - 1000) + 100, {"chunk()": 128}), least=0.03, known={}))
    assert [(one["question"], one["rule"], one["choice"]) for one in found] == [("chunk()", 128, 1024)]
    assert found[0]["gain"] == pytest.approx(972 / 124 - 1, abs=1e-3)
    assert found[0]["speedups"] == {"100": pytest.approx(972 / 124, abs=1e-3)}


def test_what_gains_little_stays_with_the_rule():
    found = list(climb.search(judge(lambda a: 100 - a["tile()"] / 128, {"tile()": 128}), least=0.03, known={}))
    assert (found[0]["choice"], found[0]["gain"], found[0]["tried"]) == (128, 0.0, 3)


def test_what_some_lengths_pay_for_is_not_taken():
    def judged(choices):
        chunk = choices.get("chunk()", 128)
        return climb.Judged({"short": chunk, "long": 100 - chunk / 10}, {(CHIP, "chunk()"): chunk})

    first, second = judged({}), judged({"chunk()": 64})
    assert climb.gain(first, second) > 0.3 > 0 > climb.worst(first, second)
    found = list(climb.search(climb.Judge(judged, "schedule", "a model", {}), least=0.03, known={}))
    assert found[0]["choice"] == 128


def test_each_number_of_a_tuple_is_tried_and_what_cannot_be_is_passed_over():
    def cost(answers):
        workers, keys = answers["block()"]
        if keys > 128:
            raise climb.RefusedError("too large")
        return 100 / workers

    found = list(climb.search(judge(cost, {"block()": (1, 128)}), least=0.03, known={}))
    assert found[0]["choice"][1] == 128
    assert found[0]["choice"][0] > 4


def test_a_question_that_follows_from_an_answer_is_asked_too():
    def judged(choices):
        tile = choices.get("tile()", 64)
        block = f"block(tile={tile})"
        answers = {(CHIP, "tile()"): tile, (CHIP, block): choices.get(block, 8)}
        return climb.Judged({"1": 1000 / tile / answers[CHIP, block] + (1e6 if tile > 128 else 0)}, answers)

    found = list(climb.search(climb.Judge(judged, "schedule", "a model", {}), least=0.03, known={}))
    assert [(one["question"], one["choice"]) for one in found][:2] == [
        ("tile()", 128),
        ("block(tile=128)", found[1]["choice"]),
    ]
    assert found[1]["choice"] > 64


def test_a_question_is_settled_once_and_its_answer_kept():
    known: dict[climb.Question, object] = {}
    pretend = judge(lambda a: a["chunk()"], {"chunk()": 4})
    assert len(list(climb.search(pretend, least=0.03, known=known))) == 1
    assert list(climb.search(pretend, least=0.03, known=known)) == []
    assert known == {(CHIP, "chunk()"): 1}
    other = judge(lambda a: a["chunk()"] * a["tile()"], {"chunk()": 4, "tile()": 1})
    assert other.cost({}).costs["100"] == 4
    assert [one["question"] for one in climb.search(other, least=0.03, known=known)] == ["tile()"]


def test_a_question_that_makes_no_difference_is_left_to_other_calls():
    known: dict[climb.Question, object] = {}
    rules = {"chunk()": 128, "tile()": 64}
    assert [one["question"] for one in climb.search(judge(lambda a: a["tile()"], rules), least=0.03, known=known)] == [
        "tile()"
    ]
    assert [one["question"] for one in climb.search(judge(lambda a: a["chunk()"], rules), least=0.03, known=known)] == [
        "chunk()"
    ]


def test_sizes_that_divide_nothing_are_tried_only_where_results_are_looked_at():
    assert climb.neighbours((4, 128), by_one=False) == [(2, 128), (8, 128), (4, 64), (4, 256)]
    assert 3 in climb.neighbours(4, by_one=True)


LINE = {"kernel": "decode", "bundles": 150, "core": 100, "HBM": 400, "keys": 128}


def test_a_chunk_costs_what_takes_longest():
    assert schedule._cycles(LINE, 128, 1, latency=0) == 50 + 400
    assert schedule._cycles(LINE, 192, 1, latency=0) == 50 + 400 + 200
    assert schedule._cycles(LINE, 128, 1, latency=500) == 50 + (100 + 400 + 500) / 2
    assert schedule._cycles(LINE | {"core": 1000, "bundles": 1050}, 192, 1, latency=500) == 50 + 2 * 1000


def test_a_prefill_costs_all_its_tiles():
    line = LINE | {"kernel": "prefill"}
    assert schedule._cycles(line, 256, 128, latency=0) == (50 + 400) + (50 + 800)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs the libtpu package")
@pytest.mark.usefixtures("optimized")
def test_by_schedule_a_decode_is_judged_for_every_question_of_it(capsys, monkeypatch):
    monkeypatch.setattr(climb, "neighbours", lambda value, by_one: [value * 2] if isinstance(value, int) else [])
    assert tune_kernels.main(["--chips", "v5e", "--models", "llama-3-70b-tp8", "--calls", "decode"]) == 0
    said = capsys.readouterr()
    entries = [json.loads(line) for line in said.err.splitlines() if line.startswith("{")]
    assert CHIP in {entry["chip"] for entry in entries}
    chunk = next(entry for entry in entries if entry["question"].startswith("chunk("))
    assert chunk["rule"] >= 128
    assert chunk["question"] in said.out


@pytest.mark.slow
def test_by_timing_a_kernel_is_run_with_what_is_tried_and_its_results_compared(monkeypatch):
    """Interpreted: what it takes means nothing here."""
    size = Scenario(model="llama-3-70b-tp8", batch=1, context=256)
    monkeypatch.setattr(timing, "scenarios", lambda model, call: [size])
    monkeypatch.setattr(timing, "REPEATS", 1)
    monkeypatch.setattr("benchmarks.kernels.timing._MOST", 2)
    question, results = "chunk(token_bytes=512, is_decode=True)", {}
    first = timing._cost(size.model, "decode", "tpu", results, {})
    assert first.answers["cpu", question] > 128
    second = timing._cost(size.model, "decode", "tpu", results, {question: 128})
    assert second.answers["cpu", question] == 128
    assert second.costs.keys() == first.costs.keys() == {size.name}
    with pytest.raises(climb.RefusedError, match="Incompatible shapes"):
        timing._cost(size.model, "decode", "tpu", results, {question: 32})  # less than a row of lanes
    with pytest.raises(climb.RefusedError, match="other results"):
        timing._cost(size.model, "decode", "tpu", {size.name: np.ones_like(results[size.name])}, {})


def test_without_a_device_there_is_nothing_to_time():
    with pytest.raises(SystemExit, match="--chips"):
        tune_kernels.main([])
