"""The table of chips."""

import pytest

from jaxserve.pallas_kernels.ahead_of_time import has_compiler
from jaxserve.pallas_kernels.chips import CHIPS, GPUS, TPUS, named, platform_of
from tests.test_imports import run_python


def test_chips_are_found_by_both_their_names():
    assert len({chip.name for chip in CHIPS.values()}) == len(CHIPS)
    assert all(named(chip.name) is chip for chip in CHIPS.values())
    assert named("Quadro 600") is None
    assert {platform_of(chip) for chip in GPUS} == {"gpu"}
    assert GPUS["b200"].compute == 100


def test_the_table_and_what_asks_it_load_no_compiler():
    """Every start asks which GPU it is on; the ways to compile for other chips are not needed for that."""
    assert run_python("import sys, jaxserve.pallas_kernels.chips; print('jax' in sys.modules)") == "False"
    code = "import sys, jaxserve.pallas_kernels.platform; print('jaxserve.pallas_kernels.ahead_of_time' in sys.modules)"
    assert run_python(code) == "False"


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="needs the libtpu package")
@pytest.mark.parametrize("chip", [chip for chip in TPUS if chip != "v4"])  # its smallest slice is of half chips
def test_a_tpu_has_the_memory_that_its_compiler_says(chip: str):
    import jax
    import jax.numpy as jnp

    from jaxserve.pallas_kernels.ahead_of_time import compile_for

    too_large = jax.ShapeDtypeStruct((1 << 38,), jnp.int8)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"exceeds available HBM \(") as failure:
        compile_for(chip, jax.jit(lambda x: x + 1), too_large)
    said = str(failure.value).partition("available HBM (")[2].partition("G)")[0]
    assert float(said) == pytest.approx(TPUS[chip].hbm_bytes / (1 << 30), abs=0.01)
