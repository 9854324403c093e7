"""DLPM: the bound, what credit may be, when it is given, and that it lies between VTC and LPM."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.policies.dlpm import Dlpm
from jaxserve.scheduler.policy import View
from tests.fakes import ask, make_engine
from tests.scheduler.policies.watch import Watch, serve, small_engine, tenants

SEEDS = st.integers(0, 1 << 32)
QUANTA = st.sampled_from((0.5, 7.0, 30.0, 200.0))
# Four slots, answers of 12 tokens, prompts of 20: what a client can overdraw by.
U = 20 + 2 * 4 * 12


def watched(policy: str, **options) -> Watch:
    return Watch(small_engine(policy, **options), lambda view, num_cached: view.num_prompt - num_cached)


@settings(max_examples=25)
@given(seed=SEEDS, quantum=QUANTA, overlap=st.booleans(), num_blocks=st.sampled_from((14, 30, 80)))
def test_service_of_clients_that_wait_stays_within_the_bound_and_credit_too(seed, quantum, overlap, num_blocks):
    watch = watched("dlpm", num_blocks=num_blocks, overlap=overlap, options={"quantum": quantum})
    credit, tick = watch.policy._clients.numbers, watch.tick

    def check(now_s):
        assert all(-U <= amount <= quantum for amount in credit.values())
        tick(now_s)

    watch.tick = check
    rng = random.Random(seed)
    serve(watch.rig, tenants(rng, 60), rng)
    assert watch.worst_gap <= 2 * (quantum + U)


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_unfair_orders_break_that_bound(policy):
    """So the test above can fail: the prompts of one client are all cached, those of the other never."""
    watch = watched(policy, num_slots=1, num_blocks=100)
    rng = random.Random(1)
    greedy = [ask(f"a{i}", [1] * 12, client="a", max_tokens=12, ignore_eos=True) for i in range(40)]
    other = [ask(f"b{i}", [i + 2] * 12, client="b", max_tokens=12, ignore_eos=True) for i in range(3)]
    serve(watch.rig, [*greedy, *other], rng, burst=60)
    assert watch.worst_gap > 2 * (30 + 12 + 2 * 12)


@settings(max_examples=15)
@given(seed=SEEDS, quantum=QUANTA)
def test_credit_is_given_only_when_nobody_who_waits_has_any(seed, quantum):
    rig = small_engine("dlpm", num_blocks=16, options={"quantum": quantum})
    policy, rng, given_out = rig.scheduler._policy, random.Random(seed), []
    refill, credit = policy._refill, policy._clients.numbers

    def watched_refill(poor):
        for view in rig.scheduler.waiting:
            comes_later = rig.scheduler._sequences[view.seq_id].num_pending  # its last token is on its way
            assert credit[view.request.client] <= 0 or comes_later
        before = dict(credit)
        refill(poor)
        assert max(credit[client] for client in poor) > 0
        for client, amount in before.items():
            gained = (credit[client] - amount) / quantum
            assert gained == pytest.approx(round(gained), abs=1e-6)
            assert not gained if amount > 0 else gained > 0
        given_out.append(poor)

    object.__setattr__(policy, "_refill", watched_refill)
    serve(rig, tenants(rng, 40), rng)
    assert given_out


@settings(max_examples=10)
@given(seed=SEEDS, num_blocks=st.sampled_from((14, 30)), num_host_blocks=st.sampled_from((0, 20)))
def test_with_a_huge_quantum_it_is_lpm(seed, num_blocks, num_host_blocks):
    """From when on all clients have some credit: they begin together."""
    plans = []
    for policy, options in (("lpm", {}), ("dlpm", {"quantum": 1e15})):
        options |= {"patience_s": 0.3}
        rig = small_engine(policy, num_blocks=num_blocks, num_host_blocks=num_host_blocks, options=options)
        rng = random.Random(seed)
        for client in "abc":
            rig.engine.add(ask(f"first {client}", [1], client=client, max_tokens=1))
        serve(rig, tenants(rng, 40), rng)
        plans.append(rig.executor.plans)
    assert plans[0] == plans[1]


@settings(max_examples=10)
@given(seed=SEEDS)
def test_with_a_tiny_quantum_the_least_served_client_goes_first(seed):
    watch = watched("dlpm", num_blocks=100, options={"quantum": 1e-3})
    rng = random.Random(seed)
    serve(watch.rig, tenants(rng, 40), rng, burst=60)  # nearly all are there from the start
    late = 0
    for view, service, waited in watch.admitted:
        least = min(service.get(client, 0) for client in waited)
        late += service.get(view.request.client, 0) > least + 1e-3 * 40
    assert late <= 3  # those that came when the first were already served


def test_nobody_starves_within_a_client():
    """A client's own hot prompts keep coming; its cold one has its turn."""
    for patience_s, starves in ((0.2, False), (1e9, True)):
        rig = small_engine("dlpm", num_blocks=60, num_slots=1, options={"patience_s": patience_s})
        watch = Watch(rig)
        rig.run(ask("warm", [1] * 16, client="a", max_tokens=1))
        rig.engine.add(ask("cold", [2] * 4, client="a", max_tokens=1))
        for index in range(150):
            for twin in "xy":
                rig.engine.add(ask(f"hot{index}{twin}", [1] * 17, client="a", max_tokens=1))
            rig.step()
        admitted = [view.request.request_id for view, _, _ in watch.admitted]
        assert ("cold" not in admitted) is starves
        rig.run()


def test_of_a_long_queue_each_clients_oldest_are_compared():
    """`a` queues so much that nobody else would be among the first."""
    policy = Dlpm(window=4, quantum=1e9)
    asked = []

    def view(name: str, client: str, cached: int) -> View:
        made = View(name, ask(name, [1] * 9, client=client), float(len(asked)), 9, 20)
        made.watch_cache(lambda: asked.append(name) or cached)
        policy.on_arrival(made, 0.0)
        return made

    waiting = [view(f"a{i}", "a", i) for i in range(10)] + [view("b0", "b", 0), view("b1", "b", 8), view("c0", "c", 5)]
    order = [each.seq_id for each in policy.order(waiting, [], 0.0)]
    assert sorted(asked) == ["a0", "a1", "b0", "c0"]
    assert order[:4] == ["c0", "a1", "a0", "b0"]
    assert order[4:] == ["b1", *(f"a{i}" for i in range(2, 10))]


def test_only_what_is_computed_is_charged_and_only_once():
    rig = make_engine(policy="dlpm", num_blocks=9, max_model_len=36, options={"quantum": 1000.0})
    credit = rig.scheduler._policy._clients.numbers
    rig.run(ask("r", [1] * 12, client="a", max_tokens=4, ignore_eos=True))
    assert credit["a"] == 1000 - 12 - 2 * 4
    rig.run(ask("again", [1] * 12, client="a", max_tokens=4, ignore_eos=True))
    assert credit["a"] == 980 - 4 - 2 * 4  # 8 tokens were cached
    rig.run(*[ask(f"b{i}", [2 + i] * 10, client="b", max_tokens=20, ignore_eos=True) for i in range(4)])
    assert rig.scheduler.counters.preemptions
    assert credit["b"] == 1000 - 4 * (10 + 2 * 20)
    rig.engine.add(ask("gone", [7] * 12, client="c", max_tokens=20, ignore_eos=True))
    rig.step()
    rig.engine.abort("gone")
    assert credit["c"] == 1000 - 12
    assert not rig.scheduler._policy._clients._live


def test_many_quanta_at_once_are_as_many_rounds():
    policy = Dlpm(quantum=10.0)
    numbers = policy._clients.numbers
    numbers |= {"a": -95.0, "b": -300.0, "idle": -25.0, "rich": 3.0, "even": 0.0}
    policy._refill({"a", "b"})
    assert numbers == {"a": 5, "b": -200, "idle": 5, "rich": 3, "even": 10}
