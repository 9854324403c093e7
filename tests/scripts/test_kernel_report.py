import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import kernel_report
from kernels import document, schedule, tpu

from jaxserve.pallas_kernels.ahead_of_time import has_compiler

TEXT = """== CAPACTIY:
MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 0 2
0 1 0 0 0 0 2 1 0 0 0
0 0 0 0 0 0 0 0 0 0 0
4 0 0 2 0 0 1 0 1 1 0
0 0 0 0 0 0 0 0 1 0 0
"""
MEMORY = """$region0: #{decode}
  #allocation3 [shape = 'bf16[2,32]{1,0}', space=vmem, size = 0x100, scoped, tag = 'scratch operand']
    #allocation5 [shape = 's32[1]{0:T(128)}', space=smem, size = 0x20, scoped, tag = 'scratch operand']
      #allocation41_spill [shape = 'u32[8,128]{1,0}', space=vmem, size = 4096, scoped, tag = 'spilled vreg/vmreg']
  %s1 = smov [#allocation3]
"""
LINE = {"chip": "v5e", "model": "m", "kernel": "decode", "core": 7, "compile s": 2.0}


def test_the_core_lies_between_bundles_that_use_the_matrix_unit():
    whole = schedule.parse(TEXT)
    core = whole.core()
    assert (len(whole.bundles), len(core.bundles)) == (5, 3)
    assert core.share("MATMUL") == pytest.approx(4 / 12)
    assert core.busy("MATMUL") == pytest.approx(1 / 3)
    assert core.share("VLOAD") == pytest.approx(3 / 9)
    assert (core.total("VSTORE:SPILL"), core.total("VLOAD:FILL")) == (1, 1)


def test_memory_counts_room_for_spills():
    assert schedule.memory(MEMORY) == {"vmem": 256 + 4096, "smem": 32}


def test_the_table_has_a_line_for_each_kernel():
    assert document.table([LINE, LINE | {"chip": "v4", "core": None}]).splitlines() == [
        "| chip | model | kernel | core | compile s |",
        "| --- | --- | --- | --: | --: |",
        "| v5e | m | decode | 7 | 2.0 |",
        "| v4 | m | decode | - | 2.0 |",
    ]


def test_a_section_replaces_only_itself(tmp_path):
    path = tmp_path / "kernels.md"
    document.put_section(path, "TPU", "one")
    document.put_section(path, "GPU", "two\n\n### within\n\nthree")
    document.put_section(path, "TPU", "four\n")
    assert path.read_text() == f"{document.TITLE}\n## TPU\n\nfour\n\n## GPU\n\ntwo\n\n### within\n\nthree\n"


def test_only_what_differs_beyond_noise_is_a_change():
    def differ(**changed):
        return document.changes([LINE], [LINE | changed], {"compile s": 3.0})

    assert differ() == differ(**{"compile s": 4.9}) == differ(new_column=1) == differ(core=None) == []
    assert differ(core=8) == [
        {"chip": "v5e", "model": "m", "kernel": "decode", "column": "core", "before": "7", "after": "8"}
    ]
    assert [(line["column"], line["after"]) for line in differ(**{"compile s": 5.5})] == [("compile s", "5.5")]


def test_a_line_that_comes_or_goes_is_a_change():
    lines = document.changes([LINE], [LINE | {"chip": "v4"}], {})
    assert {(line["chip"], line["before"], line["after"]) for line in lines} == {
        ("v5e", "there", "gone"),
        ("v4", "none", "new"),
    }


def test_the_report_of_another_commit_is_its_own(tmp_path, monkeypatch):
    """A repository whose script says something else by now."""

    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    script = tmp_path / "scripts" / "kernel_report.py"
    script.parent.mkdir()
    git("init")
    for core in (7, 8):
        script.write_text(f'import sys\nprint("a warning\\n" + \'{{"core": {core}}}\', file=sys.stderr)\n')
        git("add", ".")
        git("commit", "-m", str(core))
    script.write_text("raise ValueError\n")
    monkeypatch.setattr(kernel_report, "ROOT", tmp_path)
    assert kernel_report.lines_of("HEAD~1", ["--chips=v5e"]) == [{"core": 7}]
    assert kernel_report.lines_of("HEAD", []) == [{"core": 8}]
    with pytest.raises(SystemExit, match="nothing cannot be checked out"):
        kernel_report.lines_of("nothing", [])
    assert script.read_text() == "raise ValueError\n"


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs the libtpu package")
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_decode_waits_for_memory_and_spills_nothing(chip: str):
    line, write = tpu.lines(kernel_report.__file__, chip, "llama-3-8b", "decode")
    assert line["bound / core"] > 1
    assert line["spills"] == line["fills"] == 0
    assert write["kernel"] == "write_pages"
    assert 0 < line["VMEM KB"] < 16 << 10


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs the libtpu package")
@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("chip", "bound"), [("v5e", 0.85), ("v6e", 0.65)])
def test_prefill_stays_near_the_rate_of_the_matrix_units(chip: str, bound: float):
    """0.96 and 0.77 by the compiler of 2026-10; by that of 2026-11 a few hundredths less."""
    (line,) = tpu.lines(kernel_report.__file__, chip, "llama-3-8b", "mixed")
    assert line["bound / core"] >= bound
