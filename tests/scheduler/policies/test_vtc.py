"""VTC: the bound of the paper, the lift, weights, who passes whom, and what is remembered of clients."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.scheduler import clients
from jaxserve.scheduler.make import make_policy
from jaxserve.scheduler.policies.vtc import Vtc
from jaxserve.scheduler.policy import View
from tests.fakes import ask
from tests.scheduler.policies.watch import Watch, serve, small_engine, tenants

SEEDS = st.integers(0, 1 << 32)


def bound(num_blocks: int, block_size: int = 4, longest: int = 20) -> float:
    return 2 * max(longest, 2 * num_blocks * block_size)


def worst_gap(policy: str, seed: int, **options) -> float:
    rig = small_engine(policy, **options)
    watch = Watch(rig)
    rng = random.Random(seed)
    serve(rig, tenants(rng, 60), rng)
    return watch.worst_gap


@settings(max_examples=25)
@given(seed=SEEDS, num_blocks=st.sampled_from((11, 16, 24)), overlap=st.booleans(), caching=st.booleans())
def test_service_of_clients_that_wait_stays_within_the_papers_bound(seed, num_blocks, overlap, caching):
    options = {"num_blocks": num_blocks, "overlap": overlap, "caching": caching, "options": {"strict": True}}
    assert worst_gap("vtc", seed, **options) <= bound(num_blocks)


def test_first_come_first_served_breaks_that_bound():
    """So the test above can fail."""
    rng = random.Random(1)
    rig = small_engine("fcfs", num_blocks=11, num_slots=2)
    watch = Watch(rig)
    greedy = [ask(f"a{i}", [1, i % 19 + 1], client="a", max_tokens=12, ignore_eos=True) for i in range(60)]
    serve(rig, [*greedy, ask("b0", [2], client="b"), ask("b1", [3], client="b")], rng, burst=60)
    assert watch.worst_gap > bound(11)


@settings(max_examples=15)
@given(seed=SEEDS)
def test_each_admission_is_of_the_client_with_the_least_count(seed):
    rig = small_engine("vtc", options={"strict": True}, num_blocks=100)
    watch = Watch(rig)
    rng, seen = random.Random(seed), []
    admit = rig.scheduler._policy.on_admit

    def on_admit(view, num_cached, now_s):
        numbers = watch.policy._clients.numbers
        least = min(numbers[client] for client, count in watch.waiting.items() if count)
        seen.append(numbers[view.request.client] - least)
        admit(view, num_cached, now_s)

    watch.on_admit = on_admit
    serve(rig, tenants(rng, 40), rng)
    assert len(seen) == 40
    assert max(seen) == 0  # the pool is large: nobody is preempted


def test_a_client_that_comes_back_is_not_owed_anything():
    """`b` idles while `a` is served a lot; then both have many requests, and get alike, from then on."""
    rig = small_engine("vtc", num_blocks=100)
    watch, rng = Watch(rig), random.Random(0)
    serve(rig, [ask("b", [1], client="b", max_tokens=1)], rng)
    serve(rig, [ask(f"a{i}", [2, i % 19 + 1], client="a", max_tokens=12, ignore_eos=True) for i in range(30)], rng)
    before = watch.service.copy()
    assert before["a"] > 20 * before["b"]
    both = [ask(f"{c}-{i}", [3, i % 19 + 1], client=c, max_tokens=10, ignore_eos=True) for i in range(40) for c in "ab"]
    for request in both:
        rig.engine.add(request)
    for _ in range(60):  # nobody is through yet
        rig.step()
    assert watch.waiting["a"] and watch.waiting["b"]
    gained = {c: watch.service[c] - before[c] for c in "ab"}
    assert abs(gained["a"] - gained["b"]) <= 2 * 22 * 4 < min(gained.values())  # four slots, a request costs 22
    rig.run()


def arrive(policy, client: str, name: str, tokens: int = 10):
    view = View(name, ask(name, [1] * tokens, client=client), 0.0, tokens, 2 * tokens)
    policy.on_arrival(view, 0.0)
    return view


def test_the_lift_is_to_the_least_of_those_that_wait_else_to_who_was_last_to_wait():
    policy = Vtc()
    numbers = policy._clients.numbers
    a, b = arrive(policy, "a", "a1", 100), arrive(policy, "b", "b1", 30)
    policy.on_admit(a, 0, 0.0)
    policy.on_admit(b, 0, 0.0)  # nobody waits any more; b was the last
    assert numbers == {"a": 100, "b": 30}
    arrive(policy, "c", "c1")
    assert numbers["c"] == 30  # as much as b
    arrive(policy, "a", "a2")
    assert numbers["a"] == 100  # nobody is put back
    arrive(policy, "d", "d1")
    assert numbers["d"] == 30  # the least of a and c
    policy.charge(b, 0, 100)
    arrive(policy, "b", "b2")
    assert numbers["b"] == 230
    policy.charge(a, 0, 500)
    arrive(policy, "c", "c2")  # has one that waits already
    assert numbers["c"] == 30


def test_weights_share_service():
    rig = small_engine("vtc", num_blocks=100, options={"weights": {"a": 3, "b": 1.0}})
    watch = Watch(rig)
    for index in range(120):
        for client in "ab":
            rig.engine.add(ask(f"{client}{index}", [1, 2], client=client, max_tokens=5, ignore_eos=True))
    for _ in range(100):
        rig.step()
    assert watch.waiting["a"] and watch.waiting["b"]
    assert watch.service["a"] / watch.service["b"] == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize(("strict", "passes"), [(False, True), (True, False)])
def test_a_large_request_is_passed_by_other_clients_for_a_while_unless_strict(strict, passes):
    rig = small_engine("vtc", num_blocks=11, options={"strict": strict, "patience_s": 0.05})
    watch = Watch(rig)
    for index in range(2):  # they fill most of the pool
        rig.engine.add(ask(f"first{index}", [5 + index] * 4, client="a", max_tokens=12, ignore_eos=True))
    rig.step()
    rig.engine.add(ask("large", [1] * 30, client="large", max_tokens=4, ignore_eos=True))
    rig.engine.add(ask("large2", [2], client="large", max_tokens=1))
    for index in range(30):
        rig.engine.add(ask(f"small{index}", [3, 1 + index % 19], client="a", max_tokens=3, ignore_eos=True))
    for _ in range(400):
        if not rig.engine.has_work:
            break
        rig.step()
    rig.check_empty()
    order = [view.request.request_id for view, _, _ in watch.admitted]
    between = order[2 : order.index("large")]
    assert order.index("large") < order.index("large2")
    assert bool(between) is passes
    assert len(between) < 15, "patience has an end"


@settings(max_examples=10)
@given(seed=SEEDS)
def test_an_abort_gives_nothing_back_and_nothing_leaks(seed):
    rig = small_engine("vtc", num_blocks=14)
    watch, rng = Watch(rig), random.Random(seed)
    lowest = []
    watch.tick = lambda now_s: lowest.append(dict(watch.policy._clients.numbers))
    serve(rig, tenants(rng, 40), rng, aborts=0.3)
    for before, after in itertools.pairwise(lowest):
        assert all(after[client] >= count for client, count in before.items())
    policy = watch.policy
    assert not policy._queued
    assert not policy._passed
    assert not policy._clients._live


def test_clients_that_come_once_are_forgotten(monkeypatch):
    monkeypatch.setattr(clients, "_MOST_IDLE", 20)
    rig = small_engine("vtc", num_blocks=100)
    for index in range(100):
        rig.run(ask(f"r{index}", [1], client=f"client {index}", max_tokens=1))
    policy = rig.scheduler._policy
    assert list(policy._clients.numbers) == [f"client {index}" for index in range(80, 100)]
    assert list(policy._clients._idle) == list(policy._clients.numbers)
    stays = ask("stays", [2], client="client 99", max_tokens=1)
    rig.run(stays)  # known: it goes on from where it was
    assert policy._clients.numbers["client 99"] > policy._clients.numbers["client 98"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vtc", {"weights": {"a": 0}}, r"weights\['a'\]=0"),
        ("vtc", {"weights": {"a": "much"}}, r"weights\['a'\]='much'"),
        ("vtc", {"weights": [1]}, "must be a dict or None"),
        ("vtc", {"decode_weight": -1.0}, "decode_weight=-1.0"),
        ("vtc", {"strict": 1}, "must be a bool"),
        ("dlpm", {"quantum": 0}, "quantum=0 must be a number from 0.001 to 1e\\+15"),
        ("dlpm", {"window": 0}, "window=0"),
        ("lpm", {"patience_s": -1}, "patience_s=-1"),
        ("lpm", {"patience": 1}, "Did you mean 'patience_s'"),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_policy(name, options)


def test_what_is_computed_again_after_a_preemption_is_not_charged_again():
    rig = small_engine("vtc", num_blocks=11)
    rig.run(*[ask(f"r{i}", [1 + i] * 10, client="a", max_tokens=20, ignore_eos=True) for i in range(4)])
    assert rig.scheduler.counters.preemptions
    assert rig.scheduler._policy._clients.numbers == {"a": 4 * (10 + 2 * 20)}
