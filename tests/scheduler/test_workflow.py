"""Deadlines of stages."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.workflow import Averages, Workflow
from tests.fakes import ask


def request(name, stage, deadline_s=None, program="q"):
    return ask(name, [1], program=program, stage=stage, deadline_s=deadline_s)


def teach(workflow, seconds, times=1):
    """Programs whose stages take so long, one after the other."""
    for turn in range(times):
        for stage, service_s in seconds:
            each = request(f"t{turn}{stage}", stage, program=f"lesson{turn}")
            workflow.begin(each, 0.0)
            workflow.end(each, service_s, 0.0)
        workflow.programs.end(f"lesson{turn}")


def test_of_a_new_name_the_mean_of_all_is_taken():
    means = Averages(0.5)
    assert means.of("x") == 0
    means.note("a", 4.0)
    means.note("a", 8.0)
    assert means.of("a") == means.of("x") == 6.0


def test_stage_names_are_not_remembered_without_end():
    means = Averages(0.5)
    for number in range(5000):
        means.note(f"s{number}", 1.0)
    assert len(means._means) == 1000


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.1, 50), min_size=1, max_size=8),
    st.floats(1, 500),
    st.lists(st.floats(0, 1.5), min_size=8, max_size=8),
)
def test_stages_on_budget_use_up_the_deadline_and_no_more(seconds, deadline_s, late):
    """Each stage is given a part of what is really left: who is late leaves less to those after it."""
    stages = [(f"s{i}", s) for i, s in enumerate(seconds)]
    for shares in ([1.0] * len(stages), late[: len(stages)]):
        workflow = Workflow()
        teach(workflow, stages)
        now_s = 7.0
        for (stage, service_s), share in zip(stages, shares, strict=True):
            each = request(stage, stage, deadline_s)
            due_s, end_s = workflow.begin(each, now_s)
            assert end_s == 7.0 + deadline_s
            left_s = end_s - now_s
            if left_s > 0:
                assert now_s < due_s <= end_s + 1e-9
                after_s = sum(s for name, s in stages if name > stage)
                assert due_s - now_s == pytest.approx(left_s * service_s / (service_s + after_s))
            else:
                assert due_s == end_s
            now_s += max(due_s - now_s, 0.0) * share
            workflow.end(each, service_s, now_s)
        if shares[0] == 1.0 == max(shares) == min(shares):
            assert now_s == pytest.approx(7.0 + deadline_s)


def test_without_lessons_a_stage_has_all_the_time_that_is_left():
    workflow = Workflow()
    assert workflow.begin(request("a", "new", 30.0), 5.0) == (35.0, 35.0)


def test_the_deadline_counts_from_the_first_call_of_the_program():
    workflow = Workflow()
    first = request("a", "x", 30.0)
    workflow.begin(first, 5.0)
    workflow.end(first, 1.0, 9.0)
    assert workflow.begin(request("b", "y", 30.0), 20.0) == (35.0, 35.0)
    assert workflow.begin(request("c", "x", 30.0, program=""), 20.0)[1] == 50.0  # its own


def test_calls_at_the_same_time_are_waited_for_once():
    workflow = Workflow()
    calls = [request(f"c{i}", "draft") for i in range(3)]
    root, last = request("root", "plan"), request("last", "check")
    workflow.begin(root, 0.0)
    workflow.end(root, 1.0, 1.0)
    for each in calls:
        workflow.begin(each, 1.0)
    for each, service_s in zip(calls, (4.0, 9.0, 5.0), strict=True):
        workflow.end(each, service_s, 10.0)
    workflow.begin(last, 10.0)
    workflow.end(last, 2.0, 12.0)
    workflow.programs.end("q")
    assert [workflow._after.of(stage) for stage in ("plan", "draft", "check")] == [11.0, 2.0, 0.0]


def test_loops_are_as_long_as_they_were():
    workflow = Workflow(smoothing=1.0)
    teach(workflow, [("plan", 1.0), ("revise", 3.0), ("revise", 3.0), ("check", 2.0)])
    assert workflow._after.of("plan") == 8.0
    teach(workflow, [("plan", 1.0), ("check", 2.0)])
    assert workflow._after.of("plan") == 2.0


def test_nothing_is_learned_from_what_was_aborted():
    workflow = Workflow()
    each = request("a", "x")
    workflow.begin(each, 0.0)
    workflow.end(each, None, 3.0)
    assert workflow._service.of("x") == 0


def test_idle_programs_end_by_themselves():
    workflow = Workflow(ttl_s=10.0)
    each = request("a", "x")
    workflow.begin(each, 0.0)
    workflow.end(each, 2.0, 3.0)
    workflow.programs.sweep(13.0)
    assert len(workflow.programs) == 0
