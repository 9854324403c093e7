import json
from typing import NamedTuple

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxserve.pallas_kernels.tuning import Asked, Table, chip


class Block(NamedTuple):
    queries: int
    keys: int


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(
        json.dumps({"cpu": {"chunk(size=64, is_decode=True)": {"choice": 7}, "block()": {"choice": [3, 4]}}})
    )
    return Table(path)


@pytest.fixture
def chunk(table):
    def chunk(size: int, *, is_decode: bool) -> int:
        return size * 2

    return table(chunk)


def test_what_the_file_does_not_hold_is_decided_by_the_rule(table, chunk):
    assert [chunk(64, is_decode=True), chunk(size=64, is_decode=False), chunk(32, is_decode=True)] == [7, 128, 64]
    assert table.asked["cpu", "chunk(size=64, is_decode=True)"] == Asked(7, is_by_rule=False)
    assert table.asked["cpu", "chunk(size=32, is_decode=True)"] == Asked(64, is_by_rule=True)


def test_an_answer_has_the_type_that_the_rule_gives(table):
    def block() -> Block:
        return Block(1, 2)

    assert table(block)() == Block(3, 4)
    with table.trying({"block()": (5, 6)}):
        assert isinstance(table(block)(), Block)


def test_what_is_tried_is_forgotten(table, chunk):
    with table.trying({"chunk(size=64, is_decode=True)": 9}):
        assert chunk(64, is_decode=True) == 9
    assert chunk(64, is_decode=True) == 7


def test_another_chip_has_other_answers(chunk):
    device = AbstractDevice(platform="tpu", device_kind="TPU v5 lite", num_cores=1)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=device)):
        assert chip() == "TPU v5 lite"
        assert chunk(64, is_decode=True) == 128
    assert chip() == "cpu"


def test_no_file_is_no_fault(tmp_path):
    def size() -> int:
        return 5

    assert Table(tmp_path / "none.json")(size)() == 5
