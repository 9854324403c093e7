"""Which sizes fit, which are best, and what an error says of them."""

from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.memory import room
from jaxserve.memory.axes import closest, fitting, options_of, reason, refusal, with_more_devices
from jaxserve.memory.plan import Plan, lay_out
from jaxserve.models.config import from_hf
from jaxserve.models.published import MODELS
from jaxserve.sharding.mesh import Parallel

LLAMA_8B, LLAMA_70B = MODELS["llama-3.1-8b"], MODELS["llama-3.3-70b"]

DEFAULT = EngineConfig()


def fit(chip: str, num_devices: int, raw: dict[str, Any] = LLAMA_8B, **options: Any) -> list[Plan]:
    return fitting(EngineConfig(**options), from_hf(raw), room.of_chip(chip, num_devices))


@pytest.mark.parametrize(
    ("chip", "num_devices", "raw", "best"),
    [
        ("v5p", 1, LLAMA_8B, Parallel()),
        ("h100", 8, LLAMA_8B, Parallel(data=8)),  # the weights are a quarter of a device: nobody need wait for others
        ("v5e", 8, LLAMA_8B, Parallel(data=2, tensor=4)),  # one device cannot hold them, two have little room beside
        ("v6e", 8, LLAMA_70B, Parallel(tensor=8)),
        ("v5e", 16, LLAMA_70B, Parallel(tensor=16)),  # KV heads stored twice, but nothing else fits
        ("v5e", 7, LLAMA_8B, Parallel(data=3, tensor=2)),  # seven cannot share anything
    ],
)
def test_the_best_sizes(chip: str, num_devices: int, raw: dict[str, Any], best: Parallel):
    assert fit(chip, num_devices, raw)[0].parallel == best


def test_all_sizes_that_fit_are_there_once_and_valid():
    plans = fit("v5p", 8)
    assert len({plan.parallel for plan in plans}) == len(plans)
    assert all(plan.parallel.num_devices == 8 and not plan.problem for plan in plans)
    assert {(p.parallel.data, p.parallel.sequence, p.parallel.tensor) for p in plans} == {
        (d, s, t) for d in (1, 2, 4, 8) for s in (1, 2, 4, 8) for t in (1, 2, 4, 8) if d * s * t == 8
    }
    assert all(plan.parallel.expert == 1 for plan in plans)  # a dense model


def test_what_does_not_fit_gets_the_next_number_of_devices_that_is_enough():
    cfg, where = from_hf(LLAMA_70B), room.of_chip("v5e", 4)
    assert fitting(DEFAULT, cfg, where) == []
    assert closest(DEFAULT, cfg, where).parallel == Parallel(tensor=4)
    enough = with_more_devices(DEFAULT, cfg, where)
    assert enough is not None
    assert enough.parallel == Parallel(tensor=16)
    assert with_more_devices(DEFAULT, cfg, room.of_size(1 << 30, 8)) is None  # heads cannot be cut any further


def test_an_option_that_no_sizes_help_is_still_told():
    with pytest.raises(ConfigError, match="max_model_len=131073 is beyond"):
        fit("v5e", 8, max_model_len=131_073)


def refused(num_devices: int, raw: dict[str, Any], **options: Any) -> str:
    config, cfg, where = EngineConfig(**options), from_hf(raw), room.of_chip("v5e", num_devices)
    plan = lay_out(config, cfg, where)
    assert plan.problem
    return str(refusal(plan, config, cfg))


def test_a_refusal_names_sizes_that_would_fit():
    text = refused(8, LLAMA_8B)
    assert text.startswith("the weights need 15.0 GiB and a step ")
    assert text.endswith(
        "On 8 devices tensor_parallel_size=4, data_parallel_size=2 or tensor_parallel_size=8 "
        "or tensor_parallel_size=4, sequence_parallel_size=2 would fit."
    )
    assert refused(1, LLAMA_8B).endswith("max_num_seqs, or more memory.")
    assert refused(8, LLAMA_70B, tensor_parallel_size=8).endswith("max_num_seqs, or more memory.")


def test_a_reason_names_what_is_paid():
    reasons = {plan.parallel: reason(plan) for plan in fit("v5p", 16)}
    assert "16 replicas that never wait for each other" in reasons[Parallel(data=16)]
    assert "every KV head stored 2 times" in reasons[Parallel(tensor=16)]
    assert "prompts shared by 4, each with the same weights" in reasons[Parallel(sequence=4, tensor=4)]
    assert reason(fit("v5e", 7)[0]).endswith("3 replicas of 2, 1 idle")


def test_sizes_as_options():
    assert options_of(Parallel(data=2, tensor=4)) == "tensor_parallel_size=4, data_parallel_size=2"
    assert options_of(Parallel()) == "no parallel size"
