"""Deadlines of stages decide who goes first."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.scheduler.make import make_policy
from jaxserve.scheduler.policies.hexgen import MODES, Hexgen
from tests.fakes import ask, make_engine
from tests.scheduler.policies.programs import call, drive, graphs, view_of


def add(policy, name, deadline_s=None, *, stage="", program="", now_s=0.0):
    view = view_of(ask(name, [1, 2], deadline_s=deadline_s, stage=stage, program=program), now_s)
    policy.on_arrival(view, now_s)
    return view


def teach(policy, stage, service_s):
    view = add(policy, f"lesson {stage}", stage=stage, program=f"lesson {stage}")
    policy.on_admit(view, 0, 0.0)
    policy.on_finish(view, service_s)
    policy.on_program_end(f"lesson {stage}", service_s)


def order(policy, views, now_s=0.0, running=()):
    return [view.seq_id for view in policy.order(views, running, now_s)]


def test_the_one_with_least_slack_goes_first_not_the_one_with_the_earliest_deadline():
    for mode, wanted in (("least_slack", ["long", "short"]), ("edf", ["short", "long"])):
        policy = Hexgen(mode=mode)
        teach(policy, "draft", 40.0)
        teach(policy, "check", 1.0)
        views = [add(policy, "short", 30.0, stage="check"), add(policy, "long", 50.0, stage="draft")]
        assert order(policy, views) == wanted


def test_what_a_call_has_had_already_is_no_longer_needed():
    policy = Hexgen()
    teach(policy, "draft", 40.0)
    view = add(policy, "r0", 100.0, stage="draft")
    policy.on_admit(view, 0, 10.0)
    assert policy.left_s(view, 25.0) == 25.0
    policy.on_preempt(view, 30.0)
    assert policy.left_s(view, 99.0) == 20.0
    policy.on_admit(view, 0, 99.0)
    assert policy.left_s(view, 200.0) == 0.0


def test_a_stage_is_not_taken_for_short_because_it_was_aborted():
    policy = Hexgen()
    teach(policy, "draft", 40.0)
    view = add(policy, "r0", 100.0, stage="draft")
    policy.on_admit(view, 0, 0.0)
    policy.on_abort(view, 1.0)
    assert policy.left_s(add(policy, "r1", 100.0, stage="draft"), 1.0) == 40.0
    assert policy.workflow._service.of("draft") == 40.0


def test_lengths_of_answers_are_not_asked_in_advance():
    policy = Hexgen()
    teach(policy, "draft", 40.0)
    few, many = (view_of(ask(f"r{n}", [1], stage="draft", deadline_s=90.0, max_tokens=n)) for n in (1, 1000))
    for view in (few, many):
        policy.on_arrival(view, 0.0)
    assert policy.left_s(few, 0.0) == policy.left_s(many, 0.0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(10, 100), st.sampled_from("abc")), min_size=2, max_size=12),
    st.floats(0, 500),
    st.sampled_from(["least_slack", "edf"]),
)
def test_a_constant_more_on_all_deadlines_changes_nothing(calls, more_s, mode):
    found = []
    for extra_s in (0.0, more_s):
        policy = Hexgen(mode=mode)
        for stage, service_s in (("a", 3.0), ("b", 20.0), ("c", 8.5)):
            teach(policy, stage, service_s)
        views = [
            add(policy, f"r{i}", round(deadline_s) + round(extra_s), stage=stage)
            for i, (deadline_s, stage) in enumerate(calls)
        ]
        found.append(order(policy, views))
    assert found[0] == found[1]


def test_who_is_overdue_by_far_makes_way_for_those_who_can_be_in_time():
    policy = Hexgen(overdue_cap=0.5)
    views = [add(policy, "lost", 10.0), add(policy, "fine", 100.0), add(policy, "whenever")]
    assert order(policy, views, 15.0) == ["lost", "fine", "whenever"]
    assert order(policy, views, 15.1) == ["fine", "lost", "whenever"]


def test_whoever_has_waited_long_enough_goes_first():
    policy = Hexgen(patience_s=60.0)
    views = [add(policy, "whenever"), add(policy, "lost", 10.0)]
    views += [add(policy, f"new{now_s}", 10.0, now_s=now_s) for now_s in (55.0, 65.0)]
    assert order(policy, views, 59.9)[0] == "new55.0"
    assert order(policy, views, 60.1)[0] == "whenever"
    assert order(policy, views, 70.1)[:2] == ["whenever", "lost"]


def test_moore_hodgson_gives_up_the_longest_so_that_fewest_are_late():
    policy = Hexgen(mode="moore_hodgson")
    for stage, service_s in (("six", 6.0), ("two", 2.0), ("three", 3.0)):
        teach(policy, stage, service_s)
    calls = (("six", 6.5), ("two", 7.0), ("three", 8.0), ("three", 9.0))
    views = [add(policy, f"{stage} by {due}", due, stage=stage) for stage, due in calls]
    assert order(policy, views) == ["two by 7.0", "three by 8.0", "three by 9.0", "six by 6.5"]
    # Two at once are as if each took half as long: then all are in time.
    assert order(policy, views, running=views[:2]) == [view.seq_id for view in views]


@pytest.mark.parametrize("mode", MODES)
def test_the_least_urgent_loses_its_blocks(mode):
    policy = Hexgen(mode=mode)
    views = [add(policy, "soon", 10.0), add(policy, "never"), add(policy, "later", 20.0)]
    assert policy.victim(views, 0.0).seq_id == "never"
    assert policy.victim(views[::2], 0.0).seq_id == "later"


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), mode=st.sampled_from(MODES), blocks=st.sampled_from([18, 60]))
def test_answers_are_right_nothing_is_left_and_runs_repeat(seed, mode, blocks):
    runs = []
    for _ in range(2):
        rig = make_engine(policy="hexgen", num_slots=3, num_blocks=blocks, options={"mode": mode, "ttl_s": 1.0})
        rng = random.Random(seed)
        requests = graphs(rng, 6, deadline_s=rng.choice([None, 0.2, 5.0]), stage=rng.choice("ab"))
        drive(rig, requests, seed=seed, abort_share=0.01)
        rig.scheduler._policy.tick(1e6)
        assert len(rig.scheduler._policy.workflow.programs) == 0
        assert not rig.scheduler._policy._calls
        runs.append(rig.executor.plans)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("mode", MODES)
def test_one_without_a_deadline_is_answered_beside_an_endless_stream_with_one(mode):
    steps = {}
    for patience_s in (0.5, 1e9):
        rig = make_engine(policy="hexgen", num_slots=1, options={"mode": mode, "patience_s": patience_s})
        rng = random.Random(0)
        rig.engine.add(call(rng, "first", "", answer=(4, 4), deadline_s=1.0))
        rig.engine.add(call(rng, "low", "", answer=(4, 4)))
        for step in range(300):
            if rig.scheduler.num_waiting < 3:
                rig.engine.add(call(rng, f"r{step}", "", answer=(4, 4), deadline_s=1.0))
            if any(event.request_id == "low" and event.finish_reason for event in rig.step()):
                break
        steps[patience_s] = step
    assert steps[0.5] < 75
    assert steps[1e9] == 299


@pytest.mark.parametrize(
    "options", [{"mode": "sjf"}, {"smoothing": 0.0}, {"overdue_cap": -1.0}, {"patience_s": -1.0}, {"ttl_s": -0.1}]
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_policy("hexgen", options)
