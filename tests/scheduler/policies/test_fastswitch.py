"""Priorities that change, and what a switch costs: blocks go to host memory and come back."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError, RequestError
from jaxserve.scheduler.make import make_policy
from jaxserve.scheduler.policies.fastswitch import Fastswitch
from tests.fakes import ask, check_answer, make_engine
from tests.scheduler.policies.programs import call, chains, drive, view_of

CHURN = {"trace": "random", "frequency": 0.5, "residency": 2}


def add(policy, name, priority=0, program="", now_s=0.0):
    view = view_of(ask(name, [1], priority=priority, program=program), now_s)
    policy.on_arrival(view, now_s)
    return view


def order(policy, views, now_s=0.0):
    return [view.seq_id for view in policy.order(views, (), now_s)]


def run_until(rig, done, limit=200):
    for _ in range(limit):
        if done():
            return
        rig.step()
    raise AssertionError("it never came to that")


def host_of(rig):
    return rig.scheduler.replicas[0].host.store


def test_priorities_hold_as_they_are_now():
    policy = Fastswitch()
    views = [add(policy, f"r{i}", p, now_s=i) for i, p in enumerate((3, 1, 1))]
    assert order(policy, views) == ["r1", "r2", "r0"]
    views[0].priority = 0
    assert order(policy, views) == ["r0", "r1", "r2"]
    assert policy.victim(views, 9.0).seq_id == "r2"


def test_only_the_less_urgent_are_displaced_and_not_at_once():
    policy = Fastswitch(residency=3)
    running = [add(policy, f"r{i}", p) for i, p in enumerate((5, 7, 7, 2))]
    for view in running[:3]:
        policy.on_admit(view, 0, 0.0)
    for _ in range(2):
        policy.tick(0.0)
    policy.on_admit(running[3], 0, 0.0)
    urgent, equal = add(policy, "urgent", 1), add(policy, "equal", 7)
    assert policy.displaced(urgent, running, 0.0) is None
    policy.tick(0.0)
    assert policy.displaced(urgent, running, 0.0).seq_id in ("r1", "r2")
    assert policy.displaced(urgent, running[:1] + running[3:], 0.0).seq_id == "r0"
    assert policy.displaced(urgent, running[3:], 0.0) is None  # admitted a step ago
    assert policy.displaced(equal, running, 0.0) is None


@pytest.mark.parametrize(
    ("frequency", "steps", "wanted"), [(0.04, 1000, 40), (0.02, 1000, 20), (0.5, 7, 3), (0.0, 99, 0)]
)
def test_a_trace_is_updated_so_often_per_step(frequency, steps, wanted):
    policy = Fastswitch(trace="random", frequency=frequency)
    for _ in range(steps):
        policy.tick(0.0)
    assert policy._updates == wanted


def drawn(seed=0, trace="random", count=200, updates=20, programs=False, **options):
    """Priorities of calls after each update."""
    policy = Fastswitch(trace=trace, frequency=1.0, seed=seed, **options)
    views = [add(policy, f"r{i}", program=f"p{i // 2}" if programs else "") for i in range(count)]
    found = []
    for _ in range(updates):
        policy.tick(0.0)
        found.append([policy._calls[view.seq_id].priority for view in views])
    return found


def test_draws_are_spread_evenly_repeat_by_seed_and_go_by_conversation():
    found = drawn(levels=4)
    assert found == drawn(levels=4)
    assert found != drawn(levels=4, seed=1)
    flat = [each for turn in found for each in turn]
    assert all(abs(flat.count(level) / len(flat) - 1 / 4) < 0.03 for level in range(4))
    assert all(turn[::2] == turn[1::2] for turn in drawn(programs=True))


@pytest.mark.parametrize(
    ("stay", "low", "high"), [(0.9, 0.85, 0.96), (0.5, 0.5, 0.62), (1.0, 1.0, 1.0), (0.0, 0.08, 0.17)]
)
def test_markov_keeps_a_priority_as_often_as_asked_for(stay, low, high):
    found = drawn(trace="markov", stay=stay)
    same = [a == b for before, after in itertools.pairwise(found) for a, b in zip(before, after, strict=True)]
    assert low <= sum(same) / len(same) <= high


def test_until_its_first_update_a_request_has_its_own_priority():
    policy = Fastswitch(trace="markov", frequency=0.1)
    view = add(policy, "r0", 77)
    for _ in range(9):
        policy.tick(0.0)
        assert policy._calls["r0"].priority == 77
    assert view.priority == 77


def test_a_caller_can_change_a_priority_while_others_run():
    rig = make_engine(policy="fastswitch", num_slots=1, num_host_blocks=32, options={"residency": 0})
    rng = random.Random(0)
    requests = [call(rng, f"r{i}", "", answer=(20, 20), priority=i) for i in range(2)]
    for request in requests:
        rig.engine.add(request)
    for _ in range(6):
        rig.step()
    assert rig.scheduler.running_ids[0].startswith("r0")
    rig.engine.set_priority("r0", 5)
    rig.engine.set_priority("unknown", 5)
    rig.step()
    assert rig.scheduler.running_ids[0].startswith("r1")
    with pytest.raises(RequestError, match="smaller goes first"):
        rig.engine.set_priority("r0", float("nan"))
    outputs = rig.run()
    for request in requests:
        check_answer(outputs[request.request_id], request)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("num_host_blocks", [64, 6, 1])
def test_tokens_are_those_of_a_run_without_preemption_though_everybody_is_swapped(overlap, num_host_blocks):
    """The pool holds one of them, or two short ones. With too little host memory some are computed again."""
    rng = random.Random(4)
    requests = [call(rng, f"r{i}", "", prompt=(6, 14), answer=(40, 48)) for i in range(6)]
    rig = make_engine(
        policy="fastswitch", num_blocks=16, num_slots=4, num_host_blocks=num_host_blocks, overlap=overlap, options=CHURN
    )
    outputs = rig.run(*requests)
    for request in requests:
        check_answer(outputs[request.request_id], request)
        assert outputs[request.request_id].metrics.num_preemptions > 0
    counters = rig.scheduler.counters
    assert counters.preemptions > 12
    assert (counters.swapped == counters.preemptions) == (num_host_blocks == 64)
    assert counters.swapped > 0 or num_host_blocks == 1
    assert host_of(rig).num_held == 0


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 9999),
    trace=st.sampled_from(["random", "markov"]),
    blocks=st.sampled_from([17, 24, 60]),
    host=st.sampled_from([0, 3, 20, 200]),
    overlap=st.booleans(),
    replicas=st.integers(1, 2),
)
def test_answers_are_right_nothing_is_left_and_runs_repeat(seed, trace, blocks, host, overlap, replicas):
    runs = []
    for _ in range(2):
        rig = make_engine(
            policy="fastswitch",
            num_slots=3,
            num_blocks=blocks,
            num_host_blocks=host,
            overlap=overlap,
            num_replicas=replicas,
            options=CHURN | {"trace": trace, "stay": 0.3},
        )
        drive(rig, chains(random.Random(seed), 6, answer=(1, 24)), seed=seed, abort_share=0.01)
        assert not rig.scheduler._policy._calls
        for replica in rig.scheduler.replicas:
            assert replica.host is None or replica.host.store.num_held == 0
        runs.append(rig.executor.plans)
    assert runs[0] == runs[1]


def test_only_what_is_not_in_host_memory_yet_is_copied():
    """Two take turns on one slot; blocks of four."""
    rig = make_engine(policy="fastswitch", num_slots=1, num_host_blocks=64, overlap=False, options={"residency": 0})
    rng = random.Random(0)
    first = call(rng, "r0", "", prompt=(10, 10), answer=(30, 30), priority=1)
    rig.engine.add(first)
    rig.engine.add(call(rng, "r1", "", prompt=(3, 3), answer=(45, 45), priority=2))
    sizes = []

    def switch():
        """The first runs for a while, then the second."""
        rig.engine.set_priority("r0", 1)
        run_until(rig, lambda: "r0" in str(rig.scheduler.running_ids))
        for _ in range(6):
            rig.step()
        sequence = rig.scheduler._running[0]
        size, num_copied = sequence.num_computed, rig.scheduler.counters.swap_out_blocks
        rig.engine.set_priority("r0", 3)
        rig.step()
        sizes.append((size, rig.scheduler.counters.swap_out_blocks - num_copied))

    for _ in range(3):
        switch()
    copied_full = 0
    for size, num_copied in sizes:
        assert num_copied == -(-size // 4) - copied_full
        copied_full = size // 4
    assert sizes[-1][1] < sizes[-1][0] // 4
    outputs = rig.run()
    check_answer(outputs["r0"], first)


@pytest.mark.parametrize("keeps", [True, False])
def test_the_next_turn_of_a_conversation_finds_the_turn_before_in_host_memory(keeps):
    rig = make_engine(policy="fastswitch", num_blocks=16, num_host_blocks=64, options={"keep_copies": keeps})
    rng = random.Random(5)
    first = call(rng, "turn0", "chat", prompt=(16, 16), answer=(9, 9))
    answer = rig.run(first)["turn0"].outputs[0].token_ids
    for i in range(4):  # others take all blocks of the pool
        rig.run(call(rng, f"other{i}", "", prompt=(14, 14), answer=(40, 40)))
    assert rig.store.cached(first.prompt_token_ids, limit=16) == 0
    second = ask("turn1", [*first.prompt_token_ids, *answer, 3, 4], program="chat", max_tokens=4)
    found = rig.scheduler.counters.swap_in_blocks
    output = rig.run(second)["turn1"]
    check_answer(output, second)
    assert rig.scheduler.counters.swap_in_blocks - found == (6 if keeps else 0)
    assert output.metrics.num_cached_tokens == (24 if keeps else 0)


def test_copies_of_the_living_stay_when_those_of_past_turns_have_to_go():
    rig = make_engine(policy="fastswitch", num_slots=1, num_host_blocks=12, options={"residency": 0})
    rng = random.Random(6)
    for i in range(4):  # fill host memory with copies of turns
        rig.run(call(rng, f"turn{i}", f"chat{i}", prompt=(12, 12), answer=(8, 8)))
    assert host_of(rig).num_held == 0
    low = call(rng, "low", "", prompt=(14, 14), answer=(20, 20), priority=5)
    rig.engine.add(low)
    run_until(rig, lambda: rig.scheduler.counters.output_tokens and rig.scheduler.num_running)
    for _ in range(8):
        rig.step()
    rig.engine.add(call(rng, "high", "chat", prompt=(12, 12), answer=(20, 20), priority=1))
    run_until(rig, lambda: rig.scheduler.counters.swapped == 1)
    held = host_of(rig).num_held
    assert held >= 5
    run_until(rig, lambda: "low" in str(rig.scheduler.running_ids))
    prompt_tokens = rig.scheduler.counters.prompt_tokens
    outputs = rig.run()
    check_answer(outputs["low"], low)
    assert rig.scheduler.counters.prompt_tokens == prompt_tokens, "nothing of it was computed again"


def test_nobody_starves_beside_an_endless_stream_of_more_urgent_ones():
    steps = {}
    for patience_s in (0.5, 1e9):
        rig = make_engine(policy="fastswitch", num_slots=1, options={"patience_s": patience_s, "residency": 4})
        rng = random.Random(0)
        rig.engine.add(call(rng, "low", "", answer=(8, 8), priority=9))
        rig.engine.add(call(rng, "first", "", answer=(8, 8)))
        for step in range(500):
            if rig.scheduler.num_waiting < 3:
                rig.engine.add(call(rng, f"r{step}", "", answer=(4, 4)))
            if any(event.request_id == "low" and event.finish_reason for event in rig.step()):
                break
        steps[patience_s] = step
    assert steps[0.5] < 300
    assert steps[1e9] == 499


@pytest.mark.parametrize(
    "options",
    [{"trace": "zipf"}, {"frequency": 1.5}, {"stay": -0.1}, {"levels": 0}, {"residency": -1}, {"patience_s": -1.0}],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_policy("fastswitch", options)
