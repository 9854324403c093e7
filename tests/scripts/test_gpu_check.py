"""The script for machines with a GPU, on one without: its parts, and all of it as a rehearsal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels.scenario import Scenario, make_inputs, rehearsal, scenarios
from jaxserve.pallas_kernels.ragged_paged_attention import comparison
from jaxserve.pallas_kernels.ragged_paged_attention.cases import CASES, make_arrays
from scripts.gpu import cases, children, engine, tables
from scripts.gpu.children import Result

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.py"

CHILD = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from scripts.gpu.children import Result, answer

def run(item):
    print("a word from a library")
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "hangs":
        time.sleep(60)
    if item == "wrong | b":
        raise ValueError("no\\nmore")
    if item == "lost | b":
        raise RuntimeError("the device is gone")
    yield Result(item, "b", "passed", str(os.getpid()), {{}})

sys.exit(answer(run))
"""


@pytest.fixture
def ask():
    command = [sys.executable, "-c", CHILD.format(root=str(ROOT))]
    return lambda items, timeout_s=30: list(children.ask(command, items, timeout_s, {}))


def test_an_item_that_kills_its_process_costs_no_other(ask, capfd):
    found = ask(["one", "dies", "two", "wrong | b", "three"])
    assert [(one.item, one.state) for one in found] == [
        ("one", "passed"),
        ("dies", "failed"),
        ("two", "passed"),
        ("wrong", "failed"),
        ("three", "passed"),
    ]
    assert (found[1].text, found[3].text, found[3].name) == ("the process died with SIGKILL", "ValueError: no", "b")
    assert found[2].text == found[4].text, "an error is no reason for another process"
    assert "a word from a library" in capfd.readouterr().err


def test_a_process_that_hangs_is_ended(ask):
    found = ask(["hangs", "one"], timeout_s=2)
    assert [one.state for one in found] == ["failed", "passed"]
    assert found[0].text == "no answer within 2 s"


def test_after_an_error_of_the_device_another_process_goes_on(ask):
    found = ask(["one", "lost | b", "two"])
    assert [one.state for one in found] == ["passed", "failed", "passed"]
    assert found[0].text != found[2].text


def test_a_section_whose_processes_all_die_ends(ask):
    found = ask(["dies"] * 20)
    assert len(found) == 20
    assert found[-1].text == f"not run after {children.MOST_DEATHS} dead processes"


@pytest.mark.parametrize("what", ["output", "lse", "pool", "nan"])
def test_wrong_results_are_found(what: str):
    case = CASES["mixed"]
    expected = comparison.call(case, make_arrays(case), "ref", wants_lse=True)
    results = comparison.Results(*(x.copy() for x in expected))
    assert comparison.compare(case, results, expected).fault == ""
    if what == "output":
        results.out_tnh[3, 1, 2] += 1e-3
    elif what == "lse":
        results.lse_tn[5, 0] += 1e-3
    elif what == "pool":
        results.pages_pkbd[2, 1, 3, 4] = 7.0
    else:
        results.out_tnh[-1, 0, 0] = float("nan")  # of padding
    fault = comparison.compare(case, results, expected).fault
    assert {"output": "output", "lse": "lse", "pool": "pool", "nan": "read"}[what] in fault


def test_a_scenario_counts_bytes_and_operations():
    decode = Scenario(model="llama-3-8b", batch=2, context=1024)
    assert decode.kv_bytes == 2 * 1024 * 8 * 128 * 2 * 2
    assert decode.flops == 2 * 2 * 2 * 1024 * 32 * 128
    prompt = Scenario(model="llama-3-8b", batch=1, context=8, queries=8)
    assert prompt.flops == 2 * 2 * 32 * 128 * (8 * 9 // 2)


def test_scenarios_have_different_names_and_whole_pages():
    for found in (scenarios(is_quick=False), scenarios(is_quick=True), rehearsal()):
        assert len({one.name for one in found}) == len(found) > 2
        assert not [one for one in found if one.context % 64]


@pytest.mark.parametrize("scenario", rehearsal(), ids=lambda scenario: scenario.name)
def test_pages_hold_what_lies_contiguous(scenario: Scenario):
    inputs = make_inputs(scenario, 16)
    for row in range(scenario.batch):
        pages_mkbd = inputs.pages_pkbd[inputs.rows["table_sm"][row]]
        kv_ckd = pages_mkbd.swapaxes(1, 2).reshape(-1, *inputs.k_bskh.shape[2:3], 2 * inputs.k_bskh.shape[3])
        length = int(inputs.rows["kv_len_s"][row])
        assert (kv_ckd[..., : inputs.k_bskh.shape[3]] == inputs.k_bskh[row]).all()
        assert (kv_ckd[..., inputs.k_bskh.shape[3] :] == inputs.v_bskh[row]).all()
        new = slice(row * scenario.queries, (row + 1) * scenario.queries)
        assert (inputs.v_tkh[new] == inputs.v_bskh[row, length - scenario.queries : length]).all()


def test_tokens_count_up_to_the_first_difference():
    assert engine.equal_share([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == pytest.approx(4 / 6)


def test_the_table_compares_with_every_peer():
    def numbers(ms: float) -> dict[str, object]:
        return {"ms": ms, "seconds": [ms / 1e3], "kind": "decode", "gb_per_s": 2400.0, "tflops": 3.0, "share": 0.8}

    found = [
        Result("decode a", "gpu", "measured", "", numbers(1.0)),
        Result("decode a", "cudnn", "measured", "", numbers(1.5)),
        Result("decode b", "gpu", "refused", "too long", {"seconds": []}),
        Result("decode b", "cudnn", "measured", "", numbers(2.0)),
    ]
    assert tables.of_kernels(found, ["gpu"]).splitlines()[2:] == [
        "| decode a | gpu | 1.000 | 2400 GB/s | 80% | 1.50x |",
        "| decode b | - | - | - | - | - |",
    ]
    assert tables.reasons(found) == "refused: gpu: too long (decode b)"


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = ("JAX_PLATFORMS", "JAX_NUMPY_")  # of the tests; others' attention relies on implicit promotion
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    kept["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"  # the last one counts
    return subprocess.run(
        [sys.executable, SCRIPT, *flags],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_without_a_gpu_one_sentence_says_so():
    done = run(JAX_PLATFORMS="cpu")
    assert done.returncode == 2
    assert "JAX sees no GPU" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("section", ["cases", "kernels", "engine"])
def test_a_rehearsal_goes_through(section: str, tmp_path: Path):
    results = tmp_path / "lines.jsonl"
    done = run("--rehearse", "--only", section, "--results", str(results))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all is well\n")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    if section == "cases":
        assert lines[0]["median"] == len(cases.REHEARSED) + 1
    elif section == "kernels":
        assert {line["engine"] for line in lines if line.get("metric") == "time per call"} == {"xla", "jax xla"}
    else:
        assert lines[-1]["output_tokens_per_s"] > 0
    assert str(tmp_path) not in results.read_text()
