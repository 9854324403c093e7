"""`jaxserve simulate`, as somebody would use it who has to choose."""

import json
from pathlib import Path

import pytest

from jaxserve.cli import simulate as command
from jaxserve.cost import files
from jaxserve.workload.trace import read_trace
from tests.sim.rigs import SLOW

ON_H100 = ("simulate", "--model", "llama-3.1-8b", "--chip", "h100")
SHORT = ("--workload", "sharegpt", "--workload-options", '{"prompt": ["even", 20, 90], "answer": ["even", 2, 20]}')


def test_a_trace_is_replayed(cli, tmp_path: Path):
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:15:{second:02}.5,{100 + second},{5 + second}" for second in range(10)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    done = cli(*ON_H100, "--trace", trace)
    assert done.code == 0, done.err
    assert done.out.startswith("llama-3.1-8b on 1 x h100 x 1: ")
    assert "trace.csv: 10 calls\n" in done.out
    assert "calls ended / arrived" in done.out and "10 / 10" in done.out
    short = cli(*ON_H100, "--trace", trace, "--max-model-len", "108")
    assert "calls refused" in short.out
    assert short.out.endswith("refused, for example call 10: a prompt of 108 tokens, and max_model_len is 108\n")
    faster = cli(*ON_H100, "--trace", trace, "--rate", "100", "--json")
    assert json.loads(faster.out)["fcfs"]["end_s"] < 1 < 9


def test_policies_rates_and_layouts_are_compared(cli, tmp_path: Path):
    asked = ("--policy", "fcfs", "--policy", "priority", "--replicas", "1", "--replicas", "2", "--devices", "2")
    done = cli(*ON_H100, *SHORT, "--programs", "6", *asked, "--rate", "1", "--rate", "50", "--slo-ttft", "1", "--json")
    reports = json.loads(done.out)
    names = [f"{policy} {layout}" for layout in ("1 x h100 x 2", "2 x h100 x 1") for policy in ("fcfs", "priority")]
    assert list(reports) == [f"{name} at {rate}/s" for name in names for rate in (1, 50)]
    assert len(reports["fcfs 2 x h100 x 1 at 1/s"]["utilisation"]) == 2
    assert reports["fcfs 1 x h100 x 2 at 1/s"]["end_s"] > 2 > reports["fcfs 1 x h100 x 2 at 50/s"]["end_s"]
    assert all(facts["slo"]["share"] == 1.0 for facts in reports.values())


def test_the_same_command_prints_the_same(cli):
    arguments = (*ON_H100, *SHORT, "--programs", "8", "--json")
    assert cli(*arguments).out == cli(*arguments).out != cli(*arguments, "--seed", "1").out


def test_files_are_written(cli, tmp_path: Path):
    made = {name: tmp_path / name for name in ("w.jsonl", "c.json", "p.png")}
    wanted = ("--save-trace", made["w.jsonl"], "--chrome-trace", made["c.json"], "--plot", made["p.png"])
    done = cli(*ON_H100, *SHORT, "--programs", "4", "--rate", "2", "--rate", "4", *wanted)
    assert done.code == 0, done.err
    assert len(read_trace(made["w.jsonl"]).calls) == 4
    assert json.loads(made["c.json"].read_text())["traceEvents"]
    assert made["p.png"].stat().st_size > 10_000


def test_engine_options_matter(cli):
    asked = (*ON_H100, *SHORT, "--programs", "12", "--rate", "1000", "--json")
    plain, narrow = (json.loads(cli(*asked, *more).out)["fcfs"] for more in ((), ("--max-num-seqs", "1")))
    assert narrow["end_s"] > 2 * plain["end_s"]
    compiling = json.loads(cli(*asked, "--compiles").out)["fcfs"]
    assert compiling["compile_stall_s"] > 0 == plain["compile_stall_s"]
    slow = json.loads(cli(*asked, "--no-async-scheduling").out)["fcfs"]
    assert slow["tbt_s"]["p50"] > plain["tbt_s"]["p50"], "host time is not hidden"
    known = json.loads(cli(*asked, "--knows-lengths").out)["fcfs"]
    assert known["wasted_rows"] == 0 < plain["wasted_rows"]


def test_a_sweep_finds_rates_and_the_cheapest_layout(cli, tmp_path: Path):
    asked = ("--programs", "30", "--sweep", "--slo-ttft", "0.05", "--max-num-seqs", "2", "--rate", "10")
    layouts = ("--devices", "2", "--replicas", "1", "--replicas", "2", "--price", "h100=3")
    done = cli(*ON_H100, *SHORT, *asked, *layouts, "--plot", tmp_path / "p.png")
    assert done.code == 0, done.err
    head, *lines, cheapest = done.out.splitlines()
    assert head == "highest rate at which 90% of calls keep the SLO"
    names = ("1 x h100 x 2", "2 x h100 x 1")
    rates = {name: float(line.removeprefix(f"  {name}").split()[0]) for name, line in zip(names, lines, strict=True)}
    assert min(rates.values()) > 1
    assert cheapest == f"cheapest: {max(rates, key=rates.__getitem__)}", "all have two devices"
    assert (tmp_path / "p.png").exists()
    found = json.loads(cli(*ON_H100, *SHORT, *asked, "--json").out)
    assert found["fcfs"]["rate"] > 1 and found["fcfs"]["is_bound"]
    assert found["cheapest"] is None


def test_a_fitted_cost_model_is_used(cli, tmp_path: Path):
    files.save(SLOW, tmp_path / "cost.json")
    asked = ("simulate", "--model", "tiny", "--cost-model", tmp_path / "cost.json", *SHORT, "--programs", "4", "--json")
    done = cli(*asked)
    assert done.code == 0, done.err
    facts = json.loads(done.out)["fcfs"]
    assert facts["tbt_s"]["p50"] == pytest.approx(1e-3, rel=0.01)


def test_this_machine_is_known_roughly(cli):
    done = cli("simulate", "--model", "tiny", "--chip", "here", *SHORT, "--programs", "4", "--num-kv-blocks", "64")
    assert done.code == 0 and done.out.startswith("tiny on 1 x here x 1: 64 blocks"), done.err


def test_ctrl_c_leaves_a_partial_report(cli, monkeypatch):
    def interrupted(*args, watch, **options):
        def stop(ended, now_s):
            watch(ended, now_s)
            raise KeyboardInterrupt

        return simulate(*args, watch=stop, **options)

    simulate = command.simulate
    monkeypatch.setattr(command, "simulate", interrupted)
    done = cli(*ON_H100, *SHORT, "--programs", "5", "--policy", "fcfs", "--policy", "priority", "--json")
    assert done.code == 130
    assert "interrupted; this is what there was so far" in done.err
    reports = json.loads(done.out)
    assert list(reports) == ["fcfs"], "the other policy is not begun"
    assert reports["fcfs"]["is_partial"] and reports["fcfs"]["calls_ended"] == 1
    swept = cli(*ON_H100, *SHORT, "--programs", "5", "--sweep", "--slo-ttft", "1")
    assert swept.code == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chip", "h10", *SHORT), "unknown chip 'h10'. Did you mean 'h100'?"),
        (("--chip", "h100", "--workload", "chta"), "unknown workload 'chta'. Did you mean 'chat'?"),
        (("--chip", "h100", *SHORT, "--policy", "fcsf"), "unknown policy 'fcsf'. Did you mean 'fcfs'?"),
        (("--chip", "h100", *SHORT, "--policy", "fcfs:{bad"), "'{bad' is not JSON"),
        (
            ("--chip", "h100", *SHORT, "--policy", 'fcfs:{"a": 1}'),
            "unknown option of the scheduling policy 'fcfs': 'a'",
        ),
        (("--chip", "h100", *SHORT, "--rate", "-1"), "--rate -1 must be a positive number"),
        (("--chip", "h100", *SHORT, "--rate", "nan"), "--rate nan must be a positive number"),
        (("--chip", "h100", "--trace", "/no/such.csv"), "no such file or directory: /no/such.csv"),
        (("--chip", "h100"), "give either --trace FILE or --workload NAME"),
        (("--chip", "h100", *SHORT, "--trace", "x"), "give either --trace FILE or --workload NAME"),
        (SHORT, "give a --chip, or --cost-model FILE"),
        (("--chip", "v5e", *SHORT), "on 1 x v5e: the weights need 15.0 GiB"),
        (
            ("--chip", "h100", *SHORT, "--devices", "3", "--replicas", "2"),
            "3 devices cannot be shared evenly by 2 replicas",
        ),
        (
            ("--chip", "h100", *SHORT, "--devices", "4", "--tensor-parallel-size", "2"),
            "are 4 each, but the parallel sizes",
        ),
        (("--chip", "h100", *SHORT, "--programs", "0"), "--programs 0 must be a positive whole number"),
        (("--chip", "h100", *SHORT, "--sweep"), "--sweep needs an SLO"),
        (("--chip", "h100", *SHORT, "--slo-ttft", "0"), "--slo-ttft 0 must be a positive number"),
        (("--chip", "h100", *SHORT, "--slo-share", "2"), "--slo-share 2 must lie between 0 and 1"),
        (("--chip", "h100", *SHORT, "--plot", "x.png"), "--plot draws latency against rate"),
        (("--chip", "h100", *SHORT, "--price", "h100=cheap"), "--price h100=cheap must be like h100=1.2"),
        (("--chip", "h100", "--trace", "x", "--workload-options", "{}"), "no such file"),
    ],
)
def test_mistakes_are_one_sentence(cli, arguments, message):
    done = cli("simulate", "--model", "llama-3.1-8b", *arguments)
    assert done.code == 2
    assert message in done.err and "Traceback" not in done.err
