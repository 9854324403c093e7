"""The table of chips."""

import pytest

from jaxserve.pallas_kernels.ahead_of_time import has_compiler
from jaxserve.pallas_kernels.chips import CHIPS, GPUS, TPUS, named, platform_of, resembling
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
@pytest.mark.usefixtures("optimized")
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


@pytest.mark.parametrize(("chip", "intensity"), [("v4", 224), ("v5e", 241), ("v5p", 166), ("v6e", 560), ("tpu7x", 313)])
def test_operations_for_each_byte_of_tpus(chip: str, intensity: int):
    """A figure that does not depend on what is called a chip: TPU7x has two devices in one."""
    assert TPUS[chip].flop_per_s / TPUS[chip].hbm_bytes_per_s == pytest.approx(intensity, rel=0.01)


def test_speeds_are_dense_and_one_way():
    """The traps of data sheets: products of sparse matrices, links both ways, all links for one."""
    assert GPUS["h100"].flop_per_s < 1e15 < GPUS["h100"].flop8_per_s < 2e15
    assert GPUS["h100"].link_bytes_per_s * GPUS["h100"].num_links == 450e9
    assert GPUS["a100-80gb"].link_bytes_per_s * GPUS["a100-80gb"].num_links == 300e9
    assert TPUS["v5e"].link_bytes_per_s * TPUS["v5e"].num_links * 2 == 400e9  # as its page says of a chip
    assert TPUS["v5p"].link_bytes_per_s * TPUS["v5p"].num_links * 2 == 1200e9
    assert TPUS["v6e"].link_bytes_per_s * TPUS["v6e"].num_links * 2 == 800e9
    for chip in CHIPS.values():
        assert chip.flop_per_s <= chip.flop8_per_s <= 2.01 * chip.flop_per_s
        assert chip.host_bytes_per_s < chip.hbm_bytes_per_s / 5
        assert bool(chip.num_links) == bool(chip.link_bytes_per_s)


def test_variants_of_a_chip():
    assert resembling("NVIDIA H100 PCIe") is GPUS["h100"]
    assert resembling("NVIDIA A100-SXM4-80GB") is GPUS["a100-80gb"]
    assert resembling("TPU v6 lite") is TPUS["v6e"]
    assert resembling("NVIDIA L40S") is resembling("NVIDIA GH200 480GB") is resembling("cpu") is None
