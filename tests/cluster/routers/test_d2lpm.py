"""D2LPM: each client's service is even over replicas, and caches are followed as far as that allows."""

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.cluster.router import make_router
from tests.cluster.fleet import Fleet, request, snapshot

# Client, prompt, answer, what each of three replicas has cached, and how many of those sent are ended after it.
SENT = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.integers(1, 60),
        st.integers(0, 40),
        st.tuples(*[st.integers(0, 60)] * 3),
        st.integers(0, 3),
    ),
    max_size=60,
)


@settings(max_examples=60)
@given(SENT, st.sampled_from([1, 30, 200]))
def test_service_differs_by_two_quanta_and_charges_between_replicas_that_are_always_there(sent, quantum):
    """Answers are charged at their end, so what is charged at once to a client is a prompt and all its answers that are
    still to come."""
    router = make_router("d2lpm", {"quantum": quantum})
    charged = {(client, replica): 0 for client in "ab" for replica in range(3)}
    live, most = list[tuple[str, str, int, int]](), 0
    for number, (client, prompt, answer, cached, num_ended) in enumerate(sent):
        states = [snapshot(replica, cached=cached[replica], num_accepted=number) for replica in range(3)]
        where = router.route(request(f"r{number}", prompt, client=client), states, 0.0)
        charged[client, where] += prompt
        live.append((f"r{number}", client, where, answer))
        due = max(sum(2 * each[3] for each in live if each[1:3] == (c, w)) for c, w in charged)
        most = max(most, prompt + due)
        for name, owner, place, length in live[:num_ended]:
            router.finish(name, length)
            charged[owner, place] += 2 * length
        del live[:num_ended]
        credit = router._rule._credits
        assert all(value <= quantum for of in credit.values() for value in of.values())
        for owner in "ab":
            services = [charged[owner, replica] for replica in range(3)]
            assert max(services) - min(services) <= 2 * (quantum + most)


def test_the_cache_is_followed_until_the_credit_is_used_up():
    router = make_router("d2lpm", {"quantum": 100})
    states = [snapshot(0, num_accepted=99), snapshot(1, cached=32, num_running=5, num_accepted=99)]
    chosen = [router.route(request(f"r{number}", 40, client="a"), states, 0.0) for number in range(7)]
    # 40 + 40 + 40 use up 100 on the one with the prefix; then the other has to serve as much.
    assert chosen == [1, 1, 1, 0, 0, 0, 1]
    assert router.route(request("b", 40, client="b"), states, 0.0) == 1  # credit is each client's own


def test_answers_are_charged_when_they_end():
    fleet = Fleet(make_router("d2lpm", {"quantum": 10}))
    assert fleet.send(request("first", 1, client="a")) == 0
    fleet.end("first", num_output=5)
    assert fleet.router._rule._credits["a"] == {0: 10 - 1 - 2 * 5, 1: 10}
    assert fleet.send(request("second", 1, client="a")) == 1


def test_debt_of_many_quanta_is_paid_at_once():
    fleet = Fleet(make_router("d2lpm", {"quantum": 1}), (1.0,))
    fleet.send(request("first", 5000, client="a"))
    fleet.send(request("second", 1, client="a"))
    assert 0 >= fleet.router._rule._credits["a"][0] > -1


def test_of_very_many_clients_the_oldest_are_forgotten():
    router = make_router("d2lpm")
    for number in range(10_050):
        router.route(request(str(number), 1, client=str(number)), [snapshot(num_accepted=number)], 0.0)
        router.finish(str(number), 1)
    assert len(router._rule._credits) == 10_000
    assert "49" not in router._rule._credits
    assert "50" in router._rule._credits
