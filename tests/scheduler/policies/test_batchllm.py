"""Groups run together, their prefix is computed once and kept as long as they have members, and nobody waits for ever."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.scheduler.make import make_policy
from jaxserve.scheduler.prefix_groups import num_computed, plan_groups
from tests.fakes import VOCAB_SIZE, ask, check_answer, make_engine

SIZE = 4


def job(rng, num_groups=5, num_members=6, prefix=24, alone=4, **options):
    """Prompts with shared beginnings, shuffled."""
    draw = lambda count: [rng.randrange(1, VOCAB_SIZE) for _ in range(count)]  # noqa: E731
    heads = [draw(prefix) for _ in range(num_groups)]
    prompts = [head + draw(rng.randrange(2, 9)) for head in heads for _ in range(num_members)]
    prompts += [draw(rng.randrange(1, 20)) for _ in range(alone)]
    rng.shuffle(prompts)
    options = {"max_tokens": 6, "min_tokens": 6} | options
    return [ask(f"r{i}", prompt, **options) for i, prompt in enumerate(prompts)]


def in_groups(requests):
    """The requests in planned order, with their pins; and what the plan says has to be computed."""
    prompts = [np.array(request.prompt_token_ids, np.int32) for request in requests]
    groups = plan_groups(prompts, [request.params.max_tokens for request in requests], SIZE)
    pinned = []
    for number, group in enumerate(groups):
        for member in group.members:
            pin = {"pin": f"g{number}", "pin_tokens": group.num_shared} if group.num_shared else {}
            pinned.append(ask_again(requests[member], pin))
    return pinned, num_computed(groups, prompts)


def ask_again(request, pin):
    params = {"max_tokens": request.params.max_tokens, "min_tokens": request.params.min_tokens, "n": request.params.n}
    return ask(request.request_id, request.prompt_token_ids, temperature=0.0, **params, **pin)


def drive(rig, requests, observe=lambda: None):
    """Run a job, and unpin a group when its last member has ended. Returns the outputs."""
    left = {}
    for request in requests:
        rig.engine.add(request)
        left.setdefault(request.pin, set()).add(request.request_id)
    outputs, pins = {}, {request.request_id: request.pin for request in requests}
    for _ in range(20_000):
        if not rig.engine.has_work:
            break
        for event in rig.step():
            outputs[event.request_id] = event.output
            if event.output.finished:
                name = pins[event.request_id]
                left[name].discard(event.request_id)
                if name and not left[name]:
                    rig.scheduler.unpin(name)
        observe()
    rig.check_empty()
    return outputs


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("num_blocks", "num_replicas"), [(300, 1), (40, 1), (20, 1), (20, 2)])
def test_answers_are_those_of_each_request_alone(overlap, num_blocks, num_replicas):
    requests, _ = in_groups(job(random.Random(num_blocks)))
    rig = make_engine(policy="batchllm", num_blocks=num_blocks, num_replicas=num_replicas, overlap=overlap)
    outputs = drive(rig, requests)
    for request in requests:
        check_answer(outputs[request.request_id], request)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_so_much_is_computed_as_was_planned(overlap, seed):
    """No sharing beyond one level here: prompts of a group differ right after their prefix."""
    rng = random.Random(seed)
    requests = []
    for group in range(10):
        head = [group + 1, *(rng.randrange(1, VOCAB_SIZE) for _ in range(19))]
        requests += [ask(f"r{group}-{i}", [*head, i + 1, 1, 2, 3, 4, 5], max_tokens=5, min_tokens=5) for i in range(6)]
    rng.shuffle(requests)
    grouped, planned = in_groups(requests)
    rig = make_engine(policy="batchllm", num_blocks=40, budget=12, overlap=overlap, options={"future_share": 1.0})
    drive(rig, grouped)
    assert rig.scheduler.counters.prompt_tokens == planned < sum(len(r.prompt_token_ids) for r in requests) / 2
    rig = make_engine(policy="fcfs", num_blocks=40, budget=12, overlap=overlap)
    rig.run(*requests)
    assert rig.scheduler.counters.prompt_tokens > 1.5 * planned, "shuffled, and the least recently used goes first"


def test_open_groups_keep_to_their_share_of_the_pool():
    requests, _ = in_groups(job(random.Random(1), num_groups=8, num_members=3, prefix=16, alone=0))
    pin_tokens = {request.pin: request.pin_tokens for request in requests}
    most = {}
    for share in (0.1, 0.2, 1.0):
        rig = make_engine(
            policy="batchllm", num_blocks=60, num_slots=16, budget=64, options={"max_pinned_share": share}
        )
        most[share] = 0

        def observe(rig=rig, share=share):
            pinned = {t.removeprefix("pin:") for t in rig.store.seq_ids if t.startswith("pin:")}
            most[share] = max(most[share], sum(pin_tokens[name] for name in pinned))

        drive(rig, requests, observe)
    assert most[0.1] == 16, "one group at a time has to be possible"
    assert 16 < most[0.2] <= 0.2 * 60 * SIZE < most[1.0]


def test_members_of_open_groups_go_before_other_groups():
    rig = make_engine(policy="batchllm", num_slots=1, num_blocks=100)
    heads = {"a": [1] * 8, "b": [2] * 8}
    names = ["a", "b", "b", "a", "a"]
    requests = [
        ask(f"{name}{i}", [*heads[name], 3 + i], max_tokens=2, pin=name, pin_tokens=8) for i, name in enumerate(names)
    ]
    drive(rig, requests)
    started = dict.fromkeys(row.seq_id[0] for plan in rig.executor.plans for row in plan.rows)
    order = list(dict.fromkeys(row.seq_id.split("/")[0] for plan in rig.executor.plans for row in plan.rows))
    assert list(started) == ["a", "b"]
    assert order == ["a0", "a3", "a4", "b1", "b2"]


@pytest.mark.parametrize("seed", range(6))
def test_with_all_of_the_future_reckoned_nobody_is_preempted(seed):
    requests, _ = in_groups(job(random.Random(seed), max_tokens=20, min_tokens=20))
    preemptions = []
    for options in ({}, {"future_share": 1.0}):
        rig = make_engine(policy="batchllm", num_blocks=48, budget=32, options=options)
        drive(rig, requests)
        preemptions.append(rig.scheduler.counters.preemptions)
    assert preemptions[1] == 0 < preemptions[0]


@given(st.data())
@settings(max_examples=25)
def test_whatever_is_aborted_nothing_is_left_and_the_others_are_answered(data):
    rng = random.Random(data.draw(st.integers(0, 1 << 16)))
    requests, _ = in_groups(job(rng, num_groups=3, num_members=4))
    options = {"future_share": 1.0} if rng.random() < 0.5 else {}
    rig = make_engine(policy="batchllm", num_blocks=rng.choice([20, 60]), budget=16, options=options)
    gone = set()

    def observe():
        if rng.random() < 0.2:
            victim = rng.choice(requests)
            gone.update(event.request_id for event in rig.engine.abort(victim.request_id))

    for request in requests:
        rig.engine.add(request)
    outputs = finish(rig, {request.pin for request in requests}, observe)
    assert set(outputs) >= {request.request_id for request in requests} - gone
    policy = rig.scheduler._policy
    assert not policy._members and not policy._open


def finish(rig, pins, observe=lambda: None):
    """Run until nothing is left, then unpin."""
    outputs = {}
    while rig.engine.has_work:
        outputs |= {event.request_id: event.output for event in rig.step()}
        observe()
    for name in pins:
        rig.scheduler.unpin(name)
    rig.check_empty()
    return outputs


def test_the_next_member_computes_the_prefix_when_the_first_is_aborted():
    rig = make_engine(policy="batchllm", budget=8)
    head = [1, 2, 3, 4] * 5
    requests = [ask(f"r{i}", [*head, 5 + i, 1], max_tokens=2, pin="g", pin_tokens=20) for i in range(3)]
    for request in requests:
        rig.engine.add(request)
    rig.step()
    assert rig.scheduler.num_running == 1, "the others wait for it"
    rig.engine.abort("r0")
    outputs = finish(rig, {"g"})
    for request in requests[1:]:
        check_answer(outputs[request.request_id], request)
    assert rig.scheduler.counters.cached_tokens == 20


def test_a_prefix_that_is_cached_already_is_pinned_too():
    rig = make_engine(policy="batchllm", num_blocks=20)
    head = [1, 2, 3, 4] * 5
    rig.run(ask("before", [*head, 5], max_tokens=1))
    rig.engine.add(ask("r", [*head, 6], max_tokens=1, pin="g", pin_tokens=20))
    while rig.engine.has_work:
        rig.step()
    assert rig.scheduler.num_held_blocks == 5
    for i in range(6):
        rig.engine.add(ask(f"other{i}", [7 + i] * 40, max_tokens=8))
    while rig.engine.has_work:
        rig.step()
    assert rig.store.cached(head, limit=20) == 20, "nobody has pushed it out"


@pytest.mark.parametrize("pin_tokens", [18, 19, 20])
def test_members_wait_no_longer_than_for_whole_blocks(pin_tokens):
    rig = make_engine(policy="batchllm", budget=32)
    prompt = [1, 2, 3, 4] * 5
    requests = [ask(f"r{i}", prompt, max_tokens=8, min_tokens=8, pin="g", pin_tokens=pin_tokens) for i in range(4)]
    outputs = drive(rig, requests)
    for request in requests:
        check_answer(outputs[request.request_id], request)
    first = {row.seq_id: plan.index for plan in reversed(rig.executor.plans) for row in plan.rows}
    assert rig.scheduler.counters.cached_tokens == 3 * 16
    assert len(set(first.values())) == 2, "one computes, then the others come together"


def test_several_answers_to_one_prompt_and_no_prefix_cache():
    requests, _ = in_groups(job(random.Random(3), n=3))
    for caching in (True, False):
        rig = make_engine(policy="batchllm", num_blocks=80, caching=caching)
        outputs = drive(rig, requests)
        for request in requests:
            check_answer(outputs[request.request_id], request)


def test_without_groups_it_is_first_come_first_served():
    requests = job(random.Random(4))
    plans = []
    for policy in ("fcfs", "batchllm"):
        rig = make_engine(policy=policy, num_blocks=30)
        rig.run(*requests)
        plans.append([[(row.seq_id, row.start, row.num_tokens) for row in plan.rows] for plan in rig.executor.plans])
    assert plans[0] == plans[1]


@pytest.mark.parametrize("options", [{"max_pinned_share": 0.0}, {"max_pinned_share": 1.1}, {"future_share": 0}])
def test_shares_are_shares(options):
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        make_policy("batchllm", options)
