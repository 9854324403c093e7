"""Calls and what ties them together."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.workload.call import After, Said, Span, critical_tokens, in_order, make_workload
from tests.sim.rigs import call, work


def test_calls_come_in_order_of_arrival_and_equals_as_listed():
    workload = work(call("a", arrival_s=2.0), call("b"), call("c", arrival_s=2.0))
    assert [each.call_id for each in workload.calls] == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "test has no calls"),
        ([call("a"), call("a")], "call 'a': the id 'a' is in use already"),
        ([call("a", parents=("b",))], "call 'a': there is no call 'b'"),
        ([call("a", parents=("a",))], "call 'a': calls wait for each other in a circle: a -> a"),
        (
            [call("x"), call("a", parents=("c",)), call("b", parents=("a",)), call("c", parents=("b",))],
            "calls wait for each other in a circle: a -> c -> b -> a",
        ),
        (
            [call("a"), call("b", (After("a"), Span(1, 2)))],
            "call 'b': the prompt needs 'a', which does not come before",
        ),
        ([call("a"), call("b", (Said("a"),), parents=())], "call 'b': the prompt needs 'a'"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(calls, message):
    with pytest.raises(ConfigError, match=message):
        make_workload("test", calls)


def test_a_prompt_may_be_made_of_a_grandparent():
    make_workload("test", [call("a"), call("b", parents=("a",)), call("c", (After("a"),), parents=("b",))])


def test_a_rate_counts_programs_and_keeps_think_times():
    pairs = [(f"p{n}", n * 2.0) for n in range(5)]
    calls = [call(f"{name}{part}", arrival_s=at, program=name) for name, at in pairs for part in "xy"]
    calls.append(call("z", parents=("p0x",), think_s=7.0, program="p0"))
    faster = work(*calls).at_rate(4.0)
    assert sorted({each.arrival_s for each in faster.calls}) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert next(each for each in faster.calls if each.call_id == "z").think_s == 7.0
    with pytest.raises(ConfigError, match="arrives at once"):
        work(call("a"), call("b")).at_rate(1.0)


def test_the_first_programs_are_whole():
    workload = work(call("a"), call("b", parents=("a",)), call("c", arrival_s=1.0), call("d", parents=("c", "b")))
    assert {each.call_id for each in workload.first(1).calls} == {"a", "b"}
    assert len(workload.first(2).calls) == 4


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 9), st.sets(st.integers(0, 30), max_size=3)), min_size=1, max_size=12))
def test_the_longest_way_through_a_program(raw):
    """Against a search over all ways. Parents are earlier calls, so there are no circles."""
    calls = [
        call(str(n), output_tokens=tokens, parents=tuple(str(p % n) for p in parents) if n else ())
        for n, (tokens, parents) in enumerate(raw)
    ]
    by_id = {each.call_id: each for each in calls}

    def longest(name: str) -> int:
        return by_id[name].output_tokens + max(map(longest, by_id[name].parents), default=0)

    order = [each.call_id for each in in_order(calls)]
    assert all(order.index(parent) < order.index(each.call_id) for each in calls for parent in each.parents)
    written = {each.call_id: each.output_tokens for each in calls}
    assert critical_tokens(calls, written) == max(map(longest, by_id))
