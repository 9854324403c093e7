"""Sizes of everything, from options, a config and the room on the devices."""

from typing import Any

import pytest

from jaxserve.config import EngineConfig
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.memory import room
from jaxserve.memory.plan import Plan, lay_out
from jaxserve.models.config import from_hf
from jaxserve.models.published import MODELS

LLAMA_8B, LLAMA_70B = MODELS["llama-3.1-8b"], MODELS["llama-3.3-70b"]

GIB = 1 << 30


def planned(chip: str, num_devices: int = 1, raw: dict[str, Any] = LLAMA_8B, **options: Any) -> Plan:
    return lay_out(EngineConfig(**options), from_hf(raw), room.of_chip(chip, num_devices))


def test_a_published_model_has_its_published_size():
    """Llama 3.1 8B has 8,030,261,248 parameters; a token takes 2 x 32 layers x 8 heads x 128 x 2 bytes."""
    plan = planned("v5p")
    assert plan.needs.weights == 2 * 8_030_261_248
    assert plan.block_bytes == plan.block_size * 131_072
    assert planned("v5p", 1, kv_cache_dtype="fp8").block_bytes == plan.block_bytes // 2
    assert planned("v5p", 1, dtype="float32", kv_cache_dtype="bfloat16").block_bytes == plan.block_bytes


@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 256}, {"max_num_batched_tokens": 8192}, {"block_size": 256}])
@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"tensor": 4, "data": 2}, {"tensor": 4, "sequence": 2}])
def test_the_parts_of_a_plan_fill_what_may_be_used_and_no_more(sizes: dict[str, int], options: dict[str, Any]):
    plan = planned("v5e", 8, **options, **{f"{axis}_parallel_size": size for axis, size in sizes.items()})
    assert not plan.problem
    assert plan.usable_bytes == int(15.75 * GIB * 0.9)
    assert 0 <= plan.usable_bytes - plan.needs.total - plan.pool_bytes < plan.block_bytes


def test_a_pool_is_no_larger_than_is_of_use():
    plan = planned("v5p", max_num_seqs=3, max_model_len=1000)
    assert plan.num_blocks == 3 * 32  # 1,000 tokens are 31.25 blocks
    assert plan.free_bytes > plan.pool_bytes


def test_the_steps_own_memory_follows_the_options():
    base = planned("v5p").needs
    assert planned("v5p", 1, max_num_seqs=64).needs.sampler == 2 * base.sampler
    assert planned("v5p", 1, max_num_batched_tokens=8192).needs.activations > 3 * base.activations
    assert planned("v5p", 8, tensor_parallel_size=8).needs.sampler < base.sampler / 7
    unchunked = planned("v5p", 1, enable_chunked_prefill=False, max_model_len=8192)
    assert (unchunked.token_budget, planned("v5p").token_budget) == (8192 + 32, 2048)


def test_a_default_length_shrinks_to_the_pool_but_not_one_that_is_asked_for():
    plan = planned("v5e", 2, tensor_parallel_size=2)
    assert plan.max_model_len == plan.num_blocks * plan.block_size < 131_072
    refused = planned("v5e", 2, tensor_parallel_size=2, max_model_len=131_072)
    assert f"needs 4096 KV blocks, but there is room for {plan.num_blocks}" in refused.problem
    assert not planned("v5e", 2, tensor_parallel_size=2, max_model_len=plan.max_model_len).problem


def test_weights_that_do_not_fit_are_refused_with_both_numbers():
    problem = planned("v5e").problem
    assert problem.startswith("the weights need 15.0 GiB and a step ")
    assert problem.endswith("leaves nothing of 14.2 GiB for the KV pool")


def test_a_pool_that_is_asked_for_must_fit_the_device():
    """Beyond `memory_utilization`, which such a pool is not bound by, but not beyond what there is."""
    most = planned("v5p").free_bytes // planned("v5p").block_bytes
    assert not planned("v5p", num_kv_blocks=most + 1).problem
    too_many = planned("v5p", num_kv_blocks=1 << 20)
    assert "and 1048576 KV blocks 4.00 TiB of each device, which has 95.7 GiB" in too_many.problem


@pytest.mark.parametrize("context", [2048, 8192, 32_768])
def test_the_most_sequences_fit_and_one_more_does_not(context: int):
    options = {"max_model_len": context, "tensor_parallel_size": 8}
    most = planned("v5e", 8, **options).most_sequences(context)

    def blocks_missing(num_seqs: int) -> int:
        plan = planned("v5e", 8, max_num_seqs=num_seqs, **options)
        return num_seqs * -(-context // plan.block_size) - plan.num_blocks

    assert most > 1
    assert planned("v5e", 8, max_num_seqs=4096, **options).most_sequences(context) == most  # whatever is asked for
    assert blocks_missing(most) == 0
    assert blocks_missing(most + 1) > 0


def test_sequences_are_no_more_than_the_engine_takes():
    assert planned("b200", max_num_seqs=1).most_sequences(1) == 4096
    assert planned("v5e").most_sequences(1) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 3}, r"cannot be shared evenly by 3 devices.*from 1, 2, 4, 8, 16, 32, 64"),
        ({"tensor_parallel_size": 16}, "tensor=16 needs 16 devices, but there are 8"),
        ({"expert_parallel_size": 2}, r"expert_parallel_size=2, but LlamaForCausalLM has no experts. Use tensor_par"),
        ({"max_model_len": 200_000}, "max_model_len=200000 is beyond the 131072 positions"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 512}, "a step must hold a whole prompt"),
    ],
)
def test_options_that_no_memory_would_help_are_errors(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        planned("v5p", 8, LLAMA_70B, **options)


def test_a_dtype_that_is_not_served_is_an_error():
    with pytest.raises(CheckpointError, match="'float64' is not supported"):
        planned("v5p", 1, LLAMA_8B | {"torch_dtype": "float64"})


def test_a_pool_of_narrow_heads_is_planned_as_wide_as_the_platform_makes_it():
    raw = LLAMA_8B | {"head_dim": 80}
    assert planned("v5p", 1, raw).block_bytes == planned("v5p").block_bytes  # 80 take the room of 128 there
    assert planned("h200", 1, raw).block_bytes * 128 == planned("h200").block_bytes * 80
