"""The engine sizes itself by the same plan, and refuses what cannot be before weights are read."""

import functools
from pathlib import Path

import pytest

from jaxserve import LLM
from jaxserve.errors import CapacityError, ConfigError
from jaxserve.memory import room
from tests.models import toy

CONFIG = toy.CASES["llama3"]["config"] | {"hidden_size": 512, "intermediate_size": 4096, "num_attention_heads": 8}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose weights must not be read, on a host with little memory."""
    toy.write_checkpoint(tmp_path, CONFIG, seed=0)
    monkeypatch.setattr("jaxserve.models.weights.load", functools.partial(pytest.fail, "weights were read"))
    monkeypatch.setattr("jaxserve.models.weights.random", functools.partial(pytest.fail, "weights were made"))
    monkeypatch.setattr(room, "free_host_bytes", lambda: 8 << 20)
    return tmp_path


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_what_does_not_fit_is_refused_with_the_numbers(folder: Path, load_format: str):
    with pytest.raises(CapacityError, match=r"the weights need \d+\.\d MiB and a step .* leaves nothing of 3.60 MiB"):
        LLM(folder, load_format=load_format)


def test_the_refusal_names_sizes_for_the_devices_that_are_here(folder: Path, monkeypatch: pytest.MonkeyPatch):
    on_chips = room.Room(kind="a chip", platform="gpu", num_devices=8, device_bytes=16 << 20)
    monkeypatch.setattr(room, "of_this_machine", lambda: on_chips)
    with pytest.raises(CapacityError, match=r"On 8 devices .*tensor_parallel_size=8.* would fit\.$"):
        LLM(folder, max_num_batched_tokens=64)


def test_a_pool_that_no_device_has_is_refused(folder: Path):
    with pytest.raises(CapacityError, match=r"1000000 KV blocks .* of each device, which has 8.00 MiB"):
        LLM(folder, num_kv_blocks=1_000_000)


def test_experts_that_are_not_there_cannot_be_shared(folder: Path):
    with pytest.raises(ConfigError, match="expert_parallel_size=2, but LlamaForCausalLM has no experts"):
        LLM(folder, expert_parallel_size=2)
