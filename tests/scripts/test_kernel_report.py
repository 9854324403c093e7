import pytest

from jaxserve.pallas_kernels.ahead_of_time import has_compiler
from scripts import kernel_report

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


def test_the_core_lies_between_bundles_that_use_the_matrix_unit():
    schedule = kernel_report.parse(TEXT)
    core = schedule.core()
    assert (len(schedule.bundles), len(core.bundles)) == (5, 3)
    assert core.share("MATMUL") == pytest.approx(4 / 12)
    assert core.share("VLOAD") == pytest.approx(3 / 9)
    assert (core.total("VSTORE:SPILL"), core.total("VLOAD:FILL")) == (1, 1)


def test_the_table_has_a_line_for_each_kernel():
    assert kernel_report.table([{"chip": "v5e", "model": "m", "kernel": "decode", "core": 7}]).splitlines() == [
        "| chip | model | kernel | core |",
        "| --- | --- | --- | --: |",
        "| v5e | m | decode | 7 |",
    ]


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs the libtpu package")
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_decode_waits_for_memory_and_spills_nothing(chip: str):
    line = kernel_report.report(chip, "llama-3-8b", "decode")
    assert line["bound / core"] > 1
    assert line["spills"] == line["fills"] == 0
