"""What a run is written to: Chrome traces and pictures."""

import importlib.util
import json

import pytest

from jaxserve.errors import ConfigError
from jaxserve.sim import chrome
from jaxserve.sim.plot import plot
from jaxserve.sim.report import Slo, report
from jaxserve.sim.run import simulate
from jaxserve.workload.generate import generate
from tests.sim.rigs import spec

OPTIONS = {"prompt": ["even", 8, 60], "answer": ["even", 2, 30]}


def test_a_chrome_trace_holds_all_steps_and_calls(tmp_path):
    run = simulate(generate("sharegpt", count=12, rate=30.0, options=OPTIONS), [spec()] * 2)
    assert chrome.save_chrome_trace(run, tmp_path / "t.json") == 0
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    for replica in run.replicas:
        spans = [event for event in events if event["pid"] == replica.index and event["ph"] == "X"]
        steps = [span for span in spans if span["tid"] == 0]
        assert len(steps) == len(replica.executor.steps)
        assert sum(span["args"]["tokens"] for span in steps) == sum(replica.executor.steps.num_tokens)
        lanes = {}
        for span in spans:
            if "call" in span.get("args", {}):
                lanes.setdefault(span["tid"], []).append((span["ts"], span["ts"] + span["dur"]))
        assert sum(map(len, lanes.values())) == sum(record.replica == replica.index for record in run.records)
        for lane in lanes.values():
            for (_, end), (start, _) in zip(sorted(lane), sorted(lane)[1:], strict=False):
                assert end <= start + 1e-6, "calls of a lane do not overlap"


def test_a_very_long_trace_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(chrome, "MOST_STEPS", 10)
    run = simulate(generate("sharegpt", count=5, rate=30.0, options=OPTIONS), [spec()])
    assert chrome.save_chrome_trace(run, tmp_path / "t.json") == len(run.replicas[0].executor.steps) - 10
    json.loads((tmp_path / "t.json").read_text())


def _curves(slo):
    workload = generate("sharegpt", count=5, rate=30.0, options=OPTIONS)
    return {"fcfs": [{"rate": rate} | report(simulate(workload.at_rate(rate), [spec()]), slo) for rate in (1.0, 20.0)]}


@pytest.mark.parametrize("slo", [None, Slo(ttft_s=0.1, tpot_s=0.01)])
def test_a_picture_is_drawn(slo, tmp_path):
    plot(_curves(slo), tmp_path / "p.svg", title="a title", slo=slo)
    text = (tmp_path / "p.svg").read_text()
    assert text.count("<!-- fcfs -->") == 1 and "<!-- a title -->" in text
    assert ("<!-- SLO -->" in text) == (slo is not None)


def test_a_picture_that_cannot_be_made(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"p\.doc is no name of a picture. End it with \.png"):
        plot(_curves(None), tmp_path / "p.doc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"a picture needs matplotlib. pip install 'jaxserve\[plot\]'"):
        plot(_curves(None), tmp_path / "p.png")
