"""Blocks go to host memory and come back unchanged, whoever takes their place in between."""

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.errors import ConfigError
from jaxserve.executor.program import DeviceState, shardings
from jaxserve.executor.swap import HostPool
from jaxserve.models.config import from_hf
from jaxserve.models.kv import KVPages, empty_pages
from jaxserve.sampling.sampler import empty_state
from jaxserve.sharding.mesh import Parallel, make_mesh
from jaxserve.step import BlockSwap
from tests.models import toy

BLOCKS, HOST_BLOCKS, BLOCK_SIZE = 24, 40, 8  # of each replica


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("parallel", [None, Parallel(data=2, tensor=2)], ids=["one device", "four"])
def test_blocks_come_back_as_they_left(seed: int, parallel: Parallel | None):
    cfg = from_hf(toy.CASES["llama3"]["config"])
    num_replicas, mesh = (1, None) if parallel is None else (parallel.data, make_mesh(parallel))
    empty = DeviceState(
        empty_pages(cfg, num_replicas * BLOCKS, BLOCK_SIZE, jnp.dtype("float32")), empty_state(num_replicas, 16)
    )
    pool = HostPool(empty, mesh, num_replicas, HOST_BLOCKS)
    pool.use({name: program.lower().compile() for name, program in pool.programs(placed(empty, mesh).kv).items()})
    rng, content = random.Random(seed), np.random.default_rng(seed)
    device = content.normal(size=(num_replicas, BLOCKS, cfg.num_layers, *empty.kv.pages_pkbd.shape[1:]))
    device = device.astype(np.float32)
    host = dict[tuple[int, int], np.ndarray]()
    kv = placed(empty._replace(kv=with_pages(empty.kv, device)), mesh).kv
    planned: list[BlockSwap] = []
    for step in range(30):
        outs = [
            BlockSwap(block, host_block, replica)
            for replica in range(num_replicas)
            for block, host_block in zip(
                rng.sample(range(BLOCKS), 20), rng.sample(range(HOST_BLOCKS), rng.choice([0, 1, 3, 20])), strict=False
            )
            if all((swap.replica, swap.host) != (replica, host_block) for swap in planned)  # these are still wanted
        ]
        pool.take_out(kv, outs, step)
        host |= {(swap.replica, swap.host): device[swap.replica, swap.device].copy() for swap in outs}
        kv = pool.bring_in(kv, planned)
        for swap in planned:
            device[swap.replica, swap.device] = host[swap.replica, swap.host]
        planned = [
            BlockSwap(block, host_block, replica)
            for replica in range(num_replicas)
            for host_block, block in zip(
                [h for r, h in host if r == replica][: rng.choice([0, 2, 18])],
                rng.sample(range(BLOCKS), 20),
                strict=False,
            )
        ]
        if rng.random() < 0.5:
            pool.prefetch(planned)
        if rng.random() < 0.5:
            pool.settle(step - 1)
        np.testing.assert_array_equal(np.asarray(kv.pages_pkbd).reshape(device.shape), device)


def placed(state: DeviceState, mesh) -> DeviceState:
    return state if mesh is None else jax.device_put(state, shardings(state, mesh))


def with_pages(kv: KVPages[jax.Array], blocks: np.ndarray) -> KVPages[jax.Array]:
    return KVPages(jnp.asarray(blocks.reshape(kv.pages_pkbd.shape)), kv.num_layers, kv.dtype)


@pytest.mark.parametrize(
    "sizes", [{}, {"data_parallel_size": 2, "tensor_parallel_size": 2}], ids=["one device", "four"]
)
def test_answers_of_swapped_sequences_are_those_of_an_engine_with_room(sizes: dict[str, Any]):
    rng = random.Random(0)
    prompts = [[rng.randrange(10, 500) for _ in range(rng.randrange(20, 150))] for _ in range(16)]
    params = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)
    small = {
        "max_num_seqs": 8,
        "max_model_len": 256,
        "max_num_batched_tokens": 16,
        "progress": False,
        "dtype": "float32",
    }
    llm = LLM("tiny", **small, **sizes, num_kv_blocks=14, swap_space=0.02, preemption_mode="swap")
    expected = alone(llm, prompts, [params] * len(prompts))
    assert [out.outputs[0].token_ids for out in llm.generate(prompts, params)] == expected
    metrics = llm.metrics()
    assert metrics["swapped"] == metrics["preemptions"] > 0
    assert 0 < metrics["swap_in_blocks"] <= metrics["swap_out_blocks"]
    assert metrics["compiles_after_ready"] == metrics["kv_blocks_held"] == 0


def alone(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    """Answers to one after the other, so that nobody is preempted."""
    found = [llm.generate([prompt], each)[0] for prompt, each in zip(prompts, params, strict=True)]
    assert not llm.metrics()["preemptions"]
    return [out.outputs[0].token_ids for out in found]


@pytest.mark.parametrize("overlaps", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_answers_are_the_same_when_everybody_is_swapped_again_and_again(overlaps: bool):
    rng = random.Random(1)
    prompts = [[rng.randrange(10, 500) for _ in range(rng.randrange(20, 100))] for _ in range(10)]
    params = [
        SamplingParams(temperature=t, max_tokens=40, ignore_eos=True, seed=i, presence_penalty=0.5 * t)
        for i, t in enumerate([0.0, 1.0] * 5)
    ]
    small: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 160, "max_num_batched_tokens": 16, "progress": False}
    small |= {"dtype": "float32", "async_scheduling": overlaps}
    llm = LLM(
        "tiny",
        **small,
        num_kv_blocks=8,
        swap_space=0.02,
        preemption_mode="swap",
        scheduling_policy="fastswitch",
        enable_prefix_caching=False,  # what was answered alone is not there
        scheduling_options={"trace": "random", "frequency": 0.5, "residency": 2},
    )
    expected = alone(llm, prompts, params)
    outs = llm.generate(prompts, params)
    assert [out.outputs[0].token_ids for out in outs] == expected
    assert all(out.metrics.num_preemptions for out in outs), "everybody was swapped"
    metrics = llm.metrics()
    assert metrics["swapped"] == metrics["preemptions"] and metrics["compiles_after_ready"] == 0
    assert metrics["prompt_tokens"] == 2 * sum(map(len, prompts)), "nothing was computed twice"


def test_swap_space_that_the_host_has_not_is_refused():
    with pytest.raises(ConfigError, match="of host memory are free"):
        LLM("tiny", swap_space=1 << 20)
