"""Sizes of steps by their time (sarathi), or always the same (splitfuse), in the real scheduler."""

import random
from typing import Any

import pytest

from jaxserve.cost.roofline import of_chip, reference
from jaxserve.cost.work import work_of
from jaxserve.errors import ConfigError
from jaxserve.models.config import from_hf
from jaxserve.models.published import MODELS
from jaxserve.scheduler.make import make_policy
from jaxserve.scheduler.policies.sarathi import Sarathi
from jaxserve.scheduler.policies.splitfuse import Splitfuse
from jaxserve.scheduler.policy import Decodes, View
from jaxserve.step import StepPlan
from tests.fakes import COST, VOCAB_SIZE, Rig, ask, check_answer, make_engine

RUNGS = (16, 64, 256, 512, 1024, 2048)


def prompt_of(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(length))


def rig_of(policy: str, **options: Any) -> Rig:
    return make_engine(
        policy=policy, num_blocks=200, num_slots=8, budget=32, rungs=(4, 8, 16, 32), max_model_len=400, options=options
    )


def step_s(plan: StepPlan) -> float:
    """What a plan takes by the pretend cost model, padded as an executor would."""
    tokens = plan.num_tokens
    is_decode = all(row.num_tokens == 1 for row in plan.rows)
    rung = tokens if is_decode else next(rung for rung in (4, 8, 16, 32) if rung >= tokens)
    return COST.step_s(work_of(plan.rows, rung, 8))


def run_mixed(rig: Rig, seed: int = 0) -> None:
    """Short prompts with long answers; long prompts come while those decode."""
    rng = random.Random(seed)
    requests = [ask(f"short{i}", prompt_of(rng, 5), max_tokens=120, eos_token_ids=()) for i in range(3)]
    for request in requests:
        rig.engine.add(request)
    late = [ask(f"long{i}", prompt_of(rng, 200), max_tokens=5, eos_token_ids=()) for i in range(3)]
    outputs = {}
    for index in range(600):
        if index in (5, 15, 25):
            rig.engine.add(late[index // 10])
        if not rig.engine.has_work:
            break
        outputs |= {event.request_id: event.output for event in rig.step()}
    rig.check_empty()
    for request in (*requests, *late):
        check_answer(outputs[request.request_id], request, max_model_len=400)


@pytest.mark.parametrize("seed", range(3))
def test_steps_with_decodes_take_no_longer_than_wanted(seed: int):
    rig = rig_of("sarathi", tbt_s=0.036, margin=1.0)
    run_mixed(rig, seed)
    is_mixed = [plan for plan in rig.executor.plans if {row.num_tokens > 1 for row in plan.rows} == {True, False}]
    fcfs = rig_of("fcfs")
    run_mixed(fcfs, seed)
    assert len(is_mixed) > 20
    # The smallest size with room for a prompt's token is taken whatever it takes.
    assert all(step_s(plan) <= 0.036 or plan.num_tokens <= 8 for plan in is_mixed)
    assert max(map(step_s, fcfs.executor.plans)) > 0.05


def test_prompts_come_to_an_end_however_little_time_there_is():
    """Every step from the first chunk to the last has one; and decodes in all of them."""
    rig = rig_of("sarathi", tbt_s=1e-6)
    run_mixed(rig)
    plans = rig.executor.plans
    feeding = [
        index
        for index, plan in enumerate(plans)
        if any(row.seq_id.startswith("long") and row.start < 200 for row in plan.rows)
    ]
    assert feeding == list(range(feeding[0], feeding[-1] + 1))
    assert {plans[index].num_tokens for index in feeding[:100]} == {4}
    decodes = [{row.seq_id for row in plan.rows} for plan in plans[feeding[0] : feeding[0] + 100]]
    assert all(sum(seq_id.startswith("short") for seq_id in ids) == 3 for ids in decodes)


def test_the_whole_budget_while_nobody_decodes():
    rig = rig_of("sarathi", tbt_s=1e-6)
    rig.run(ask("alone", prompt_of(random.Random(0), 100), max_tokens=3, eos_token_ids=()))
    assert [plan.num_tokens for plan in rig.executor.plans][:3] == [32, 32, 32]


def test_budgets_shrink_as_contexts_grow():
    policy = make_policy("sarathi", {"tbt_s": 0.06}, cost=reference(), rungs=RUNGS)
    budgets = [policy.token_budget(Decodes(20, context), 2048) for context in (20, 100_000, 300_000, 10_000_000)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] == 512 and budgets[-1] == 64
    # The place that the longest prompt under way has got to counts, too; until it is through, or thrown out.
    views = [View(name, ask(name, (1,)), 0.0, 60_000, 60_010) for name in ("a", "b")]
    for view in views:
        policy.on_admit(view, 0, 0.0)
    policy.charge(views[0], 20_000, 0)
    assert policy.token_budget(Decodes(20, 20), 2048) == 256
    policy.charge(views[0], 40_000, 0)
    assert policy.token_budget(Decodes(20, 20), 2048) == 512
    policy.charge(views[0], -5_000, 0)  # planned away again
    assert policy.token_budget(Decodes(20, 20), 2048) == 64
    assert policy.victim(views[::-1], 0.0) is views[0]
    assert policy.token_budget(Decodes(20, 20), 2048) == 512
    policy.charge(views[1], 50_000, 0)
    assert policy.token_budget(Decodes(20, 20), 2048) == 64
    policy.on_abort(views[1], 0.0)
    assert policy.token_budget(Decodes(20, 20), 2048) == 512


@pytest.mark.parametrize("rungs", [RUNGS, ()])
def test_budgets_stay_within_the_engines(rungs: tuple[int, ...]):
    policy = make_policy("sarathi", cost=reference(), rungs=rungs)
    for most in (16, 100, 512, 2048):
        for decodes in (0, 1, 15, 16, 63, 100, 512, 3000):
            budget = policy.token_budget(Decodes(decodes, 100 * decodes), most)
            assert 1 <= budget <= most
            assert budget > decodes or budget == most


def test_splitfuse_has_one_size():
    rig = rig_of("splitfuse", tokens=8)
    run_mixed(rig)
    fed = [plan.num_tokens for plan in rig.executor.plans if any(row.num_tokens > 1 for row in plan.rows)]
    assert sorted(fed)[len(fed) // 10] == max(fed) == 8


def test_splitfuse_finds_the_knee_of_the_throughput():
    """On an A100 the reference computes as long as it reads weights at 115 tokens; the next size is all that is needed."""
    policy = make_policy("splitfuse", cost=reference(), rungs=RUNGS)
    assert isinstance(policy, Splitfuse)
    assert policy.token_budget(Decodes(10, 1000), 2048) == 256
    faster = of_chip("v6e", from_hf(MODELS["llama-3.1-8b"]))  # computes 560 operations for each byte that it reads
    assert make_policy("splitfuse", cost=faster, rungs=RUNGS).token_budget(Decodes(0, 0), 2048) == 512
    assert policy.token_budget(Decodes(300, 1000), 2048) == 316
    assert policy.token_budget(Decodes(10, 1000), 100) == 64


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("sarathi", {"tbt_s": 0.0}, "tbt_s=0.0 of the policy 'sarathi' must be above 0"),
        ("sarathi", {"margin": -1}, "margin=-1 of the policy 'sarathi' must be above 0"),
        ("sarathi", {"tbt_s": "1"}, "option tbt_s='1' of the scheduling policy 'sarathi' must be a float or int"),
        ("sarathi", {"cost": None}, "unknown option of the scheduling policy 'sarathi': 'cost'"),
        ("splitfuse", {"tokens": 0}, "option tokens=0 of the policy 'splitfuse' must be at least 1"),
        ("splitfuse", {"tokens": 1.5}, "must be a int or None"),
    ],
)
def test_a_mistake_is_one_sentence(name: str, options: dict[str, Any], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        make_policy(name, options, cost=reference(), rungs=RUNGS)


def test_policies_are_made_with_what_the_engine_offers():
    policy = make_policy("sarathi", {"tbt_s": 1}, cost=COST, rungs=(4, 8))
    assert isinstance(policy, Sarathi) and (policy.cost, policy.rungs, policy.tbt_s) == (COST, (4, 8), 1)
