"""ATLAS: longest paths through programs of calls at the same time. Level queues are tested with PLAS."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.policies import atlas
from jaxserve.scheduler.policies.atlas import Atlas
from jaxserve.scheduler.policies.plas import Plas
from tests.fakes import ask, make_engine
from tests.scheduler.policies.programs import chains, drive, view_of

SMALL = {"levels": 4, "first_bound": 4.0, "bound_factor": 2.0, "window": 1}


def begin(policy, name, parents=(), now_s=0.0):
    """A call comes and runs; returns its view and the service it begins with."""
    view = view_of(ask(name, [1], program="p", parents=parents), now_s)
    policy.on_arrival(view, now_s)
    policy.on_admit(view, 0, now_s)
    return view, policy._calls[name].before


def end(policy, view, tokens, now_s=0.0):
    for _ in range(tokens):
        policy.charge(view, 0, 1)
    policy.on_finish(view, now_s)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=20), st.booleans())
def test_on_a_chain_every_call_begins_as_in_plas(lengths, tells_parents):
    starts = []
    for policy in (Plas(), Atlas()):
        found = []
        for number, tokens in enumerate(lengths):
            parents = (f"r{number - 1}",) if tells_parents and number else ()
            view, start = begin(policy, f"r{number}", parents)
            found.append(start)
            end(policy, view, tokens)
        starts.append(found)
    assert starts[0] == starts[1] == [sum(lengths[:i]) for i in range(len(lengths))]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), tells_parents=st.booleans())
def test_on_chains_the_schedule_is_that_of_plas(seed, tells_parents):
    plans = []
    for policy in ("plas", "atlas"):
        rig = make_engine(policy=policy, num_slots=3, num_blocks=24, options=SMALL | {"beta": 2.0})
        drive(rig, chains(random.Random(seed), 6), seed=seed, tells_parents=tells_parents)
        plans.append(rig.executor.plans)
    assert plans[0] == plans[1]


def live_graph(policy, seed, *, tells_parents, check):
    """Calls of one random graph come when their parents have ended, and end in random order. `check` is called at each
    start. Returns the longest path. A root that comes late begins with what the policy says (it cannot know that it is
    one)."""
    rng = random.Random(seed)
    size = rng.randint(2, 14)
    parents = {i: rng.sample(range(i), min(i, rng.randint(0, 3))) for i in range(size)}
    tokens = {i: rng.randint(0, 200) for i in range(size)}
    true_path, ended, live, left = {}, set(), {}, set(range(size))
    while left or live:
        ready = [i for i in sorted(left) if all(p in ended for p in parents[i])]
        if ready and (not live or rng.random() < 0.6):
            number = rng.choice(ready)
            left.remove(number)
            names = tuple(f"r{p}" for p in parents[number]) if tells_parents else ()
            view, start = begin(policy, f"r{number}", names)
            longest = max((true_path[p] for p in parents[number]), default=0)
            begins = longest if parents[number] or not tells_parents else start
            true_path[number] = begins + tokens[number]
            live[number] = view
            check(number, parents[number], start, longest)
        else:
            number = rng.choice(sorted(live))
            end(policy, live.pop(number), tokens[number])
            ended.add(number)
    return max(true_path.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_with_parents_a_call_begins_with_the_longest_path_to_it(seed):
    def check(number, parents, start, longest):
        if parents:
            assert start == longest

    live_graph(Atlas(), seed, tells_parents=True, check=check)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_without_parents_it_begins_with_no_less_than_the_longest_path_to_it(seed):
    def check(number, parents, start, longest):
        assert start >= longest

    policy = Atlas()
    longest = live_graph(policy, seed, tells_parents=False, check=check)
    assert policy.programs.rows[0].longest >= longest


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=6), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_of_rounds_with_barriers_the_longest_calls_add_up(rounds, rng):
    policy, passed = Atlas(), 0
    for turn, lengths in enumerate(rounds):
        views = []
        for branch, _ in enumerate(lengths):  # all come before the first of them ends
            view, start = begin(policy, f"r{turn}.{branch}")
            assert start == passed
            views.append(view)
        order = list(range(len(lengths)))
        rng.shuffle(order)
        for branch in order:
            end(policy, views[branch], lengths[branch])
        passed += max(lengths)
    assert policy.programs.rows[0].longest == passed


def test_a_wide_program_passes_for_as_long_as_its_longest_call_not_as_their_sum():
    for policy, wanted in ((Atlas(), 10), (Plas(), 80)):
        views = [begin(policy, f"map{i}")[0] for i in range(8)]
        for view in views:
            end(policy, view, 10)
        assert begin(policy, "reduce")[1] == wanted


def test_parents_that_are_unknown_are_as_if_not_told():
    policy = Atlas()
    view, _ = begin(policy, "r0")
    end(policy, view, 30)
    assert begin(policy, "r1", ("elsewhere",))[1] == 30
    view, start = begin(policy, "r2", ("elsewhere", "r0"))
    assert start == 30


def test_of_several_answers_the_longest_counts():
    policy = Atlas()
    request = ask("r", [1], program="p", n=2)
    views = [view_of(request) for _ in range(2)]
    for index, view in enumerate(views):
        view.seq_id = f"r/{index}"
        policy.on_arrival(view, 0.0)
        policy.on_admit(view, 0, 0.0)
    end(policy, views[0], 50)
    end(policy, views[1], 20)
    assert begin(policy, "next", ("r",))[1] == 50


def test_an_aborted_call_counts_as_far_as_it_came():
    policy = Atlas()
    view, _ = begin(policy, "r0")
    for _ in range(7):
        policy.charge(view, 0, 1)
    policy.on_abort(view, 0.0)
    assert begin(policy, "r1", ("r0",))[1] == 7


def test_of_very_many_calls_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(atlas, "_MOST_PATHS", 10)
    policy = Atlas()
    for number in range(30):
        view, _ = begin(policy, f"r{number}", (f"r{number - 1}",) if number else ())
        end(policy, view, 1)
    (row,) = policy.programs.rows
    assert list(row.paths) == [f"r{number}" for number in range(20, 30)]
    assert row.longest == 30
