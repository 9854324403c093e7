"""A simulated replica that is given the instants of a real engine's steps makes the same plans."""

import random

import pytest

from jaxserve.build import build
from jaxserve.config import EngineConfig
from jaxserve.cost.roofline import of_chip
from jaxserve.model_source import find_config
from jaxserve.models.registry import read_config
from jaxserve.scheduler.make import make_policy
from jaxserve.sim.live import LatchedClock, LiveReplica, RepeatedReplica
from jaxserve.sim.replica import ReplicaSpec
from jaxserve.sim.run import run_on
from jaxserve.workload.call import Call, Span, Workload, make_workload

SLOTS, BLOCKS, LENGTH, BUDGET = 8, 10, 256, 64


def workload(seed: int) -> Workload:
    """Arrivals that an engine on CPU is too slow for, and prompts that share nothing but beginnings."""
    rng, now_s, calls = random.Random(seed), 0.01, list[Call]()
    beginning = tuple(Span(rng.randrange(3, 500), 1) for _ in range(40))
    for index in range(24):
        now_s += rng.expovariate(1000)
        rest = tuple(Span(rng.randrange(3, 500), 1) for _ in range(rng.randrange(5, 100)))
        prompt = beginning + rest if rng.random() < 0.5 else rest
        calls.append(
            Call(
                call_id=f"c{index}",
                prompt=prompt,
                output_tokens=rng.randrange(20, 70),
                arrival_s=now_s,
                priority=rng.randrange(3),
                client=f"client {index % 3}",
            )
        )
    return make_workload("test", calls)


@pytest.mark.parametrize("policy", ["priority", pytest.param("fcfs", marks=pytest.mark.slow)])
def test_plans_of_a_real_engine_are_repeated_by_the_simulator(policy: str):
    clock = LatchedClock()
    config = EngineConfig(
        scheduling_policy=policy,
        max_num_seqs=SLOTS,
        max_model_len=LENGTH,
        max_num_batched_tokens=BUDGET,
        num_kv_blocks=BLOCKS,
        progress=False,
    )
    built = build("tiny", config, clock=clock)
    cost = of_chip("t4", built.model)
    spec = ReplicaSpec(cost=cost, num_blocks=BLOCKS, max_num_seqs=SLOTS, token_budget=BUDGET, max_model_len=LENGTH)
    calls = workload(0)
    live = LiveReplica(0, spec, built.engine, built.executor, clock)
    real = run_on([live], calls, knows_lengths=True)
    repeated = RepeatedReplica(0, spec, make_policy(policy), clock.instants)
    simulated = run_on([repeated], calls, knows_lengths=True)
    assert live.scheduler.counters.preemptions, "the pool is small"
    assert repeated.executor.steps.digest.hexdigest() == live.executor.steps.digest.hexdigest()
    assert repeated.scheduler.counters == live.scheduler.counters
    assert [r.first_s for r in simulated.records] == [r.first_s for r in real.records]
    assert [r.num_output for r in simulated.records] == [call.output_tokens for call in calls.calls]


def test_other_instants_lead_to_other_plans():
    """The test above can fail."""
    calls = workload(0)
    spec = ReplicaSpec(
        cost=of_chip("t4", read_config(find_config("tiny"))),
        num_blocks=BLOCKS,
        max_num_seqs=SLOTS,
        token_budget=BUDGET,
        max_model_len=LENGTH,
    )
    digests = set[str]()
    for factor in (1.0, 3.0):
        replica = RepeatedReplica(0, spec, make_policy("fcfs"), [factor * 1e-3 * i for i in range(100_000)])
        run_on([replica], calls, knows_lengths=True)
        digests.add(replica.executor.steps.digest.hexdigest())
    assert len(digests) == 2
