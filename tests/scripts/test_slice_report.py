import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import slice_report
from kernels import document
from slices import report, traffic
from slices.cases import CASES

from jaxserve.memory.plan import lay_out
from jaxserve.memory.room import of_chip
from jaxserve.models.config import from_hf
from jaxserve.pallas_kernels.ahead_of_time import has_compiler
from jaxserve.sharding.hlo import Collective

PAIR, MB = ((0, 1),), 1 << 20
FACTS = {
    "num_layers": 2,
    "weights": 300 * MB,
    "pool": 400 * MB,
    "sampler": 10 * MB,
    "activations": 50 * MB,
    "hbm": 1024 * MB,
    "arguments": 720 * MB,
    "results": 1 * MB,
    "aliased": 410 * MB,
    "temp": 30 * MB,
    "layer": {"all-reduce": 2},
    "layer_results": 4096,
    "layer_sent": 6144,
    "step": {"all-reduce": (5, 2_000_000), "all-gather": (1, 10_000)},
    "others": 2,
    "largest_other": 2048,
    "largest_moved": 1024,
    "async": 0,
    "unwanted": [],
    "compile_s": 1.2,
    "kernels": 4,
}


def collective(kind: str, op_name: str, result_bytes: int = 8, groups=PAIR) -> Collective:
    return Collective(name="a", kind=kind, groups=groups, result_bytes=result_bytes, op_name=op_name)


def test_collectives_are_told_apart_by_scope():
    found = [
        collective("all-reduce", "jit(f)/shard_map/psum"),
        collective("all-reduce", "jit(f)/shard_map/layer0/psum"),
        collective("all-reduce", "jit(f)/shard_map/layer0/mlp/psum"),
        collective("all-reduce", "jit(f)/shard_map/layer10/psum"),
        collective("all-gather", "jit(f)/shard_map/sample/cond/all_gather"),
        collective("all-gather", "jit(f)/shard_map/sample/cond/all_gather", groups=((0,), (1,))),
    ]
    parts = traffic.by_part(found)
    assert {name: len(part) for name, part in parts.items()} == {"embed": 1, "layer0": 2, "layer10": 1, "sample": 1}


def test_large_arrays_that_are_handed_on_are_found_and_sums_are_not():
    kinds = ("all-gather", "all-to-all", "collective-permute", "all-reduce", "reduce-scatter")
    found = [collective(kind, "", size) for kind in kinds for size in (99, 100)]
    found.append(collective("all-gather", "", 1000, groups=((0,), (1,))))  # of one device: nothing moves
    moved = traffic.moved_arrays(found, 100)
    assert [(one.kind, one.result_bytes) for one in moved] == [(kind, 100) for kind in kinds[:3]]


def test_a_step_in_order_has_no_complaint():
    assert report.complaints(FACTS) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temp": 400 * MB}, "needs 1.18 GB of 1.07 GB"),
        ({"aliased": 399 * MB}, "copies the pool"),
        ({"unwanted": ["all-gather a.1 of 5 bytes"]}, "moves an array of a weight's size: all-gather a.1 of 5 bytes"),
        ({"kernels": 0}, "does not run our kernels"),
    ],
)
def test_what_is_wrong_is_said(change: dict, message: str):
    assert report.complaints(FACTS | change) == [message]


def test_a_line_shows_a_device():
    line = report.line_of(CASES[0], "decode", FACTS)
    assert (line["slice"], line["mesh"], line["step"]) == ("v5e-4", "tensor=4", "decode")
    assert (line["step MB planned"], line["step MB"]) == (52, 33)
    assert (line["HBM GB planned"], line["HBM GB"], line["usable GB"]) == (0.8, 0.79, 1.07)
    assert (line["per layer"], line["layer KB"], line["sent MB"]) == ("2 all-reduce", "4.0 (6.0)", 2.01)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.slice}-{case.model}")
def test_every_case_fits_its_slice_by_plan(case):
    """Devices as many as the topology has chips, weights and a pool for at least one longest sequence."""
    chip, chips = case.topology.split(":")
    assert case.parallel.num_devices == eval(chips.replace("x", "*"))
    plan = lay_out(report.CONFIG, from_hf(case.config), of_chip(chip, case.parallel.num_devices), case.parallel)
    assert not plan.problem
    assert plan.num_blocks * plan.block_size >= report.LENGTH


def test_the_document_has_the_newest_line_of_each_step(tmp_path, monkeypatch):
    """Cases are compiled one by one, because each takes minutes: the others keep the lines that they have."""
    monkeypatch.setattr(slice_report, "RESULTS", tmp_path / "slices.jsonl")
    monkeypatch.setattr(report, "versions", lambda: {"jax": "1", "libtpu": "2"})
    path = tmp_path / "slices.md"
    one, two = (report.line_of(CASES[0], rung, FACTS) for rung in report.RUNGS)
    slice_report.write(path, [two])
    slice_report.write(path, [one | {"layers": 3}])
    slice_report.write(path, [one])
    assert len((tmp_path / "slices.jsonl").read_text().splitlines()) == 3
    text = path.read_text()
    assert document.table([one, two]) in text
    assert "jax 1, libtpu 2" in text


@pytest.mark.parametrize("option", ["--slices=v9-4", "--models=gpt-5", "--steps=prefill"])
def test_unknown_names_are_refused(option: str, capsys):
    with pytest.raises(SystemExit):
        slice_report.main([option])
    assert "no such" in capsys.readouterr().err


def test_a_pair_that_is_no_case_is_refused(capsys):
    with pytest.raises(SystemExit):
        slice_report.main(["--slices=v5e-4", "--models=mixtral-8x7b"])
    assert "none of these models" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs the libtpu package")
@pytest.mark.usefixtures("optimized")
def test_experts_on_sixteen_chips():
    """Compiled by a process of its own, as the report does: a layer sums twice, as a dense one, and nothing is handed on."""
    line = report.line(slice_report.__file__, report.case_of("v5p-32", "like-deepseek-v3"), "decode")
    assert (line["layers"], line["per layer"]) == (4, "2 all-reduce")
    activations = report.ROWS * 7168 * 2
    assert line["layer KB"] == f"{2 * activations / 1024} ({2 * 2 * activations * 15 / 16 / 1024})"
    assert line["gathers KB"] < 100
    assert line["HBM GB"] < line["HBM GB planned"]
