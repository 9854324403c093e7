"""PLAS and the level queues that it shares with ATLAS and MLFQ."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.request import Task
from jaxserve.scheduler.make import make_policy
from jaxserve.scheduler.policies.mlfq import Mlfq
from jaxserve.scheduler.policies.plas import Plas
from tests.fakes import ask, make_engine
from tests.scheduler.policies.programs import call, chains, drive, graphs, view_of

SMALL = {"levels": 4, "first_bound": 4.0, "bound_factor": 2.0, "window": 1}
KINDS = ("plas", "atlas", "mlfq")


def serve(policy, request, tokens, now_s=0.0):
    """A call that comes, runs and ends."""
    view = view_of(request, now_s)
    policy.on_arrival(view, now_s)
    start = policy._calls[view.seq_id].before
    policy.on_admit(view, 0, now_s)
    policy.charge(view, view.num_prompt, 0)
    for _ in range(tokens):
        policy.charge(view, 0, 1)
    policy.on_finish(view, now_s)
    return start


def add(policy, name, program="", now_s=0.0, **options):
    view = view_of(ask(name, [1, 2, 3], program=program, **options), now_s)
    policy.on_arrival(view, now_s)
    return view


def admit(policy, name, program="", now_s=0.0):
    view = add(policy, name, program, now_s)
    policy.on_admit(view, 0, now_s)
    return view


def order(policy, now_s=0.0):
    return [view.seq_id for view in policy.order((), (), now_s)]


def test_a_call_begins_with_the_service_of_the_calls_that_have_ended():
    policy = Plas()
    starts = [serve(policy, ask(f"r{i}", [1], program="p"), tokens) for i, tokens in enumerate((30, 50, 7))]
    assert starts == [0, 30, 80]


def test_live_calls_of_a_program_do_not_compete_with_each_other():
    policy = Plas(**SMALL)
    first = admit(policy, "r0", "p")
    for _ in range(9):
        policy.charge(first, 0, 1)
    assert policy._calls["r0"].level == 1 + 1  # it moved down by itself ...
    assert policy._calls[add(policy, "r1", "p").seq_id].level == 0  # ... and its sibling did not


def test_levels_are_first_come_first_served_queues():
    policy = Plas(**SMALL)
    serve(policy, ask("old", [1], program="long"), 5)
    names = ["long", *(f"p{i}" for i in range(4))]
    for number, name in enumerate(names):
        add(policy, f"r{number}", name)
    assert order(policy) == ["r1", "r2", "r3", "r4", "r0"]


def test_who_is_preempted_keeps_the_level_and_the_quantum_it_has_by_then():
    """Not the level it came with, and not a new quantum."""
    policy = Plas(**SMALL)
    view = admit(policy, "r0", "p")
    for _ in range(6):
        policy.charge(view, 0, 1)
    mine = policy._calls["r0"]
    assert (mine.level, mine.quantum) == (1, 4 - 2)
    policy.on_preempt(view, 1.0)
    add(policy, "r1", "new")
    assert order(policy) == ["r1", "r0"]
    policy.on_admit(view, 0, 1.0)
    assert (mine.level, mine.quantum) == (1, 2)


def test_who_is_preempted_keeps_its_place_before_later_calls_of_its_level():
    policy = Plas(**SMALL)
    view = admit(policy, "r0", "p")
    add(policy, "r1", "q")
    policy.on_preempt(view, 1.0)
    assert order(policy) == ["r0", "r1"]


def test_a_quantum_is_used_up_by_tokens_that_are_there_not_by_prompts_or_plans():
    policy = Plas(**SMALL)
    view = admit(policy, "r0", "p")
    policy.charge(view, 1000, 0)
    assert policy._calls["r0"].level == 0
    for _ in range(4):
        policy.charge(view, 0, 1)
    assert policy._calls["r0"].level == 1


def test_prompts_count_where_that_is_asked_for_but_only_once():
    policy = Plas(**SMALL, prefill_weight=0.5)
    request = ask("r0", [1] * 20, program="p")
    view = view_of(request)
    policy.on_arrival(view, 0.0)
    policy.on_admit(view, 0, 0.0)
    policy.charge(view, 12, 0)
    policy.charge(view, 8, 0)
    policy.charge(view, -8, 0)  # planned away again
    policy.charge(view, 8, 0)
    policy.on_preempt(view, 0.0)
    policy.on_admit(view, 0, 0.0)
    policy.charge(view, 20, 0)  # computed again
    policy.charge(view, 0, 1)
    policy.on_finish(view, 0.0)
    assert policy.programs.rows[0].service == 10 + 1


def test_calls_at_the_same_time_count_once_in_the_wait_of_their_program():
    policy = Plas(**SMALL)
    views = [add(policy, f"r{i}", "p", 0.0) for i in range(8)]
    for view in views:
        policy.on_admit(view, 0, 2.0)
    for view in views:
        policy.on_finish(view, 5.0)
    (row,) = policy.programs.rows
    assert (row.wait_s, row.run_s) == (2.0, 3.0)
    view = add(policy, "next", "p", 9.0)  # the time between calls is nobody's wait
    policy.on_admit(view, 0, 10.0)
    policy.on_finish(view, 14.0)
    assert (row.wait_s, row.run_s) == (3.0, 7.0)


def test_who_waits_beta_times_as_long_as_it_ran_goes_to_the_first_level():
    policy = Plas(**SMALL, beta=3.0)
    view = admit(policy, "r0", "p", 0.0)
    for _ in range(9):
        policy.charge(view, 0, 1)
    policy.on_preempt(view, 2.0)
    policy.tick(7.9)
    add(policy, "r1", "q", 7.9)
    assert order(policy) == ["r1", "r0"]
    policy.tick(8.0)
    add(policy, "r2", "s", 8.0)
    assert policy._calls["r0"].level == 0
    assert order(policy) == ["r1", "r0", "r2"]  # at the end of the first level
    assert policy._calls["r0"].quantum == 4
    assert policy._calls["r0"].wait_s == policy._calls["r0"].run_s == 0


def test_the_wait_and_run_of_earlier_calls_count_for_later_ones():
    policy = Plas(**SMALL, beta=3.0)
    view = admit(policy, "r0", "p", 0.0)
    for _ in range(9):
        policy.charge(view, 0, 1)
    policy.on_finish(view, 2.0)
    add(policy, "r1", "p", 10.0)
    policy.tick(15.9)
    assert policy._calls["r1"].level == 2
    policy.tick(16.0)
    assert policy._calls["r1"].level == 0


def test_a_call_that_ended_while_it_waited_is_not_promoted():
    policy = Plas(**SMALL, beta=1.0)
    view = admit(policy, "r0", "p", 0.0)
    for _ in range(5):
        policy.charge(view, 0, 1)
    policy.on_preempt(view, 1.0)
    policy.on_abort(view, 1.5)
    policy.tick(10.0)
    assert order(policy) == []


@pytest.mark.parametrize("window", [1, 4])
def test_only_who_stands_further_back_is_displaced_and_the_furthest_first(window):
    policy = Plas(**SMALL | {"window": window, "first_bound": 8.0})
    running = [admit(policy, f"r{i}", f"p{i}") for i in range(3)]
    for view, tokens in zip(running, (9, 17, 0), strict=True):
        for _ in range(tokens):
            policy.charge(view, 0, 1)
    newcomer = add(policy, "new", "new")
    chosen = []
    for _ in range(2 * window):
        policy.tick(0.0)
        victim = policy.displaced(newcomer, running, 0.0)
        chosen.append(victim and victim.seq_id)
    assert chosen == ([None] * (window - 1) + ["r1"]) * 2  # at the end of a window, after one of residence
    assert policy.displaced(newcomer, running[:1] + running[2:], 0.0) is running[0]
    assert policy.displaced(newcomer, running[2:], 0.0) is None  # of the same level, and earlier
    assert policy.victim(running, 0.0) is running[1]


def test_who_was_admitted_within_the_window_stays():
    """It would have come for nothing; where all is computed again it might never get anywhere."""
    policy = Plas(**SMALL | {"window": 4})
    policy.tick(0.0)
    running, newcomer = admit(policy, "r0", "p"), add(policy, "new", "new")
    for _ in range(9):
        policy.charge(running, 0, 1)
    chosen = []
    for _ in range(2, 9):
        policy.tick(0.0)
        chosen.append(policy.displaced(newcomer, [running], 0.0))
    assert chosen == [None] * 6 + [running]  # windows end with steps 4 and 8


def test_nobody_is_displaced_with_less_than_a_window_of_its_quantum_left():
    policy = Plas(**SMALL | {"window": 3})
    running = admit(policy, "r0", "p")
    newcomer = add(policy, "new", "new")
    for _ in range(3):
        policy.tick(0.0)
    for tokens_left in (4, 3, 2, 1):  # of its second quantum
        while policy._calls["r0"].level == 0 or policy._calls["r0"].quantum > tokens_left:
            policy.charge(running, 0, 1)
        assert (policy.displaced(newcomer, [running], 0.0) is running) == (tokens_left >= 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_program_does_not_wait_for_a_long_one(kind):
    """Preemption is not only for want of blocks: here there are enough, and no slot."""
    ends = {}
    for policy in ("fcfs", kind):
        rig = make_engine(policy=policy, num_slots=1, num_blocks=64, options=SMALL if policy != "fcfs" else {})
        rng = random.Random(0)
        rig.engine.add(call(rng, "long", "long", answer=(40, 40)))
        for _ in range(20):
            rig.step()
        rig.engine.add(call(rng, "short", "short", answer=(3, 3)))
        steps = 0
        while not any(event.request_id == "short" and event.finish_reason for event in rig.step()):
            steps += 1
        ends[policy] = steps
        while rig.engine.has_work:
            rig.step()
    assert ends[kind] <= 5 < 20 <= ends["fcfs"]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 999), kind=st.sampled_from(KINDS), slots=st.integers(2, 5), blocks=st.sampled_from([18, 60]))
def test_service_of_ended_and_aborted_calls_adds_up_and_rows_go(seed, kind, slots, blocks):
    rig = make_engine(policy=kind, num_slots=slots, num_blocks=blocks, options=SMALL | {"ttl_s": 1e9, "beta": 2.0})
    policy = rig.scheduler._policy
    requests = graphs(random.Random(seed), 8)
    outputs = drive(rig, requests, seed=seed, abort_share=0.01)
    written = sum(len(output.outputs[0].token_ids) for output in outputs.values())
    if kind != "mlfq":
        assert sum(row.service for row in policy.programs.rows) == written
        assert len(policy.programs) == 8
        for number in range(4):
            rig.engine.end_program(f"p{number}")
        assert len(policy.programs) == 4
    policy.tick(1e9 + 1e6)
    assert len(policy.programs) == 0
    assert not policy._calls
    assert not policy._queue


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 999), kind=st.sampled_from(KINDS), overlap=st.booleans())
def test_the_same_trace_gives_the_same_schedule(seed, kind, overlap):
    runs = []
    for _ in range(2):
        rig = make_engine(policy=kind, num_slots=3, num_blocks=24, overlap=overlap, options=SMALL | {"beta": 2.0})
        drive(rig, graphs(random.Random(seed), 6), seed=seed)
        runs.append(rig.executor.plans)
    assert runs[0] == runs[1]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 999), kind=st.sampled_from(KINDS))
def test_no_call_runs_while_one_before_it_that_fits_is_left_out(seed, kind):
    """Blocks and budget are enough for all, so that slots are what is short; every step is the end of a window."""
    rig = make_engine(policy=kind, num_slots=3, num_blocks=200, budget=200, rungs=(200,), options=SMALL)
    scheduler, policy, plan, looked = rig.scheduler, rig.scheduler._policy, rig.scheduler.plan, []

    def checked(now_s):
        movable = {sequence.seq_id for sequence in scheduler._running if sequence.num_left}
        made = plan(now_s)
        sequences = scheduler._sequences
        left_out = [v.seq_id for v in scheduler.waiting if not sequences[v.seq_id].num_pending]
        for seq_id in left_out:
            assert scheduler.num_running == 3
            for other in set(scheduler.running_ids) & movable:
                looked.append(other)
                assert policy._calls[other].rank < policy._calls[seq_id].rank
        return made

    scheduler.plan = checked
    drive(rig, chains(random.Random(seed), 12, answer=(4, 16)), seed=seed)
    assert looked


def finish_of_a_long_one(policy, **options):
    """Steps until a long program ends, while there are always three short ones that could take both slots."""
    rig = make_engine(policy=policy, num_slots=2, num_blocks=200, options=SMALL | options)
    rng, num_short = random.Random(0), 0
    rig.engine.add(call(rng, "long", "long", answer=(40, 40)))
    for step in range(1200):
        while rig.scheduler.num_waiting + rig.scheduler.num_running < 4:
            num_short += 1
            rig.engine.add(call(rng, f"r{num_short}", f"p{num_short}", prompt=(2, 2), answer=(4, 4)))
        if any(event.request_id == "long" and event.finish_reason for event in rig.step()):
            return step
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_starves_beside_an_endless_stream_of_short_programs(kind):
    assert finish_of_a_long_one(kind, beta=2.0) is not None
    assert finish_of_a_long_one(kind, beta=1e9) is None  # so it was the promotions


def test_calls_of_one_program_are_one_program_and_others_each_their_own():
    """What makes PLAS more than MLFQ: the tenth call of a program does not pass for a new one."""
    for kind, levels in (("plas", [0, 1, 2]), ("mlfq", [0, 0, 0])):
        policy = make_policy(kind, SMALL)
        found = []
        for number in range(3):
            name = f"r{number}"
            view = admit(policy, name, "p")
            found.append(policy._calls[name].level)
            for _ in range(3 if number == 0 else 4):
                policy.charge(view, 0, 1)
            policy.charge(view, 0, 1)
            policy.on_finish(view, 0.0)
        assert found == levels
        assert policy._calls == {}
    assert isinstance(policy, Mlfq)


def test_prompt_only_tasks_and_several_answers_pass_through():
    rig = make_engine(policy="plas", num_slots=2, options=SMALL)
    rng = random.Random(3)
    requests = [
        ask(f"s{i}", [1 + i] * 9, task=Task.SCORE, logprobs_from=1, program="p", prompt_logprobs=0) for i in range(3)
    ]
    requests += [call(rng, f"r{i}", "p", n=3, temperature=0.5, seed=i) for i in range(3)]
    outputs = rig.run(*requests)
    assert all(output.finished for output in outputs.values())
    assert len(rig.scheduler._policy.programs) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 0}, "window=0"),
        ({"beta": -1.0}, "beta"),
        ({"bound_factor": 1.0}, "no levels"),
        ({"levels": 65}, "no levels"),
        ({"first_bound": 0.0}, "no levels"),
        ({"quantum": 3}, "quantum"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        make_policy("plas", options)
