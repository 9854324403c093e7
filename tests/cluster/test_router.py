"""What holds for every router: who may be chosen, that stale snapshots are corrected, and that nothing is random."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.cluster.router import ROUTERS, Router, make_router
from jaxserve.cluster.rule import Rule
from jaxserve.errors import ConfigError, InvariantError, RequestError
from tests.cluster.fleet import Fleet, request, snapshot

EACH = pytest.mark.parametrize("name", ROUTERS)
# A request, the end of one, or a look at fresh snapshots; each with numbers to choose by.
EVENTS = st.lists(
    st.tuples(st.sampled_from(["send", "end", "look", "drain"]), st.integers(0, 5), st.integers(1, 200)), max_size=40
)


class Spy(Rule):
    """Remembers what it saw."""

    def __init__(self):
        self.seen = []
        self.ended = []

    def choose(self, request, snapshots, now_s):
        self.seen.append(snapshots)
        return snapshots[0]

    def on_finish(self, request, replica, num_output):
        self.ended.append((request.request_id, replica, num_output))


def walk(router, events):
    """Where requests went; with snapshots as old as the last look."""
    fleet, live, choices = Fleet(router, (1.0, 2.0, 3.0)), list[str](), list[int]()
    seen = fleet.snapshots()
    for number, (kind, pick, size) in enumerate(events):
        if kind == "send":
            each = request(f"r{number}", [pick + 1] * size, client=f"c{pick}", program=f"p{pick}", priority=pick - 1)
            if all(s.is_draining for s in seen):
                with pytest.raises(RequestError, match="draining"):
                    fleet.send(each, float(number), seen)
                continue
            choices.append(fleet.send(each, float(number), seen))
            assert not seen[choices[-1]].is_draining
            live.append(each.request_id)
        elif kind == "end" and live:
            fleet.end(live.pop(pick % len(live)), size)
        elif kind == "look":
            seen = fleet.snapshots()
        elif kind == "drain":
            fleet.draining ^= {pick % 3}
            seen = fleet.snapshots()
    for name in live:
        fleet.end(name)
    assert not router._live
    return choices


@EACH
@settings(max_examples=20)
@given(events=EVENTS)
def test_the_same_events_lead_to_the_same_choices_and_draining_replicas_get_nothing(name, events):
    assert walk(make_router(name), events) == walk(make_router(name), events)


@EACH
def test_a_router_goes_on_from_a_copy_of_its_state(name):
    router = make_router(name)
    seen = [snapshot(0, num_running=1, work_s=1.0), snapshot(1, service_s=2.0), snapshot(2, num_running=1, work_s=2.0)]
    calls = [request(f"r{n}", [n % 3 + 1] * 3000, client=f"c{n % 2}", program=f"p{n % 4}") for n in range(30)]
    first = [router.route(call, seen, 0.0) for call in calls[:10]]
    router.finish("r1", 70)
    other = copy.deepcopy(router)
    rest = [router.route(call, seen, 1.0) for call in calls[10:]]
    assert [other.route(call, seen, 1.0) for call in calls[10:]] == rest
    assert len({*first, *rest}) > 1


@EACH
def test_one_replica_takes_all(name):
    fleet = Fleet(make_router(name), (1.0,))
    assert {fleet.send(request(f"r{number}", 40)) for number in range(5)} == {0}


@EACH
def test_many_requests_between_two_looks_do_not_all_go_to_one_replica(name):
    options = {"alpha": 0.0} if name == "hexgen" else {}
    fleet = Fleet(make_router(name, options), (1.0, 1.0, 1.0, 1.0))
    old = fleet.snapshots()
    chosen = [fleet.send(request(f"r{number}", [number + 1] * 40), snapshots=old) for number in range(8)]
    assert sorted(chosen) == [0, 0, 1, 1, 2, 2, 3, 3]


@EACH
def test_a_prompt_goes_where_it_fits(name):
    small, large = snapshot(0, num_blocks=4, num_free=4), snapshot(1, num_running=5, num_free=60, work_s=9.0)
    assert make_router(name).route(request("r", 64), [small, large], 0.0) == 1
    assert make_router(name).route(request("r", 5000), [small, snapshot(1, is_draining=True)], 0.0) == 0


def test_stale_snapshots_are_corrected_and_fresh_ones_are_not():
    spy = Spy()
    router = Router(spy)
    old = snapshot(num_accepted=7, service_s=2.0)
    sizes = [20, 40, 10]
    for number, size in enumerate(sizes):
        router.route(request(f"r{number}", size, priority=-number), [old], 0.0)
    assert spy.seen[0] == [old]
    (last,) = spy.seen[2]
    assert (last.num_waiting, last.waiting_blocks, last.first_waiting_blocks) == (2, 2 + 3, 2)
    assert (last.queued_tokens, last.work_s, last.num_urgent) == (60, 4.0, 1)
    half = snapshot(num_accepted=9, num_running=2)  # it has taken in two of the three
    router.route(request("r3"), [half], 0.0)
    assert (spy.seen[3][0].num_running, spy.seen[3][0].num_waiting, spy.seen[3][0].queued_tokens) == (2, 1, 10)
    fresh = snapshot(num_accepted=11)
    router.route(request("r4"), [fresh], 0.0)
    assert spy.seen[4] == [fresh]
    anew = snapshot(num_accepted=0)  # it was started again, and what was under way is lost
    router.route(request("r5"), [anew], 0.0)
    assert spy.seen[5] == [anew]


def test_a_prompt_under_way_counts_as_cached_where_it_is_computed_until_it_ends():
    router = make_router("prefix_affinity")
    states = [snapshot(0, num_running=1), snapshot(1)]
    text = list(range(1, 200))
    assert router.route(request("first", text), [snapshot(0), snapshot(1)], 0.0) == 0
    assert router.route(request("second", [*text, 7]), states, 0.0) == 0
    assert router.route(request("other", [*text, 7], namespace="other"), states, 0.0) == 1
    router.finish("first", 1)
    router.finish("second", 1)
    states = [snapshot(0, num_accepted=9, num_running=2), snapshot(1, num_accepted=9)]
    assert router.route(request("third", [*text, 7]), states, 0.0) == 1


def test_rules_hear_of_ends_once_and_of_requests_sent_again():
    spy = Spy()
    router = Router(spy)
    router.route(request("a"), [snapshot(3)], 0.0)
    router.route(request("a"), [snapshot(4)], 1.0)
    router.finish("a", 5)
    router.finish("a", 5)
    router.finish("unknown", 5)
    assert spy.ended == [("a", 3, 0), ("a", 4, 5)]


def test_round_robin_takes_turns_among_those_that_take_requests():
    fleet = Fleet(make_router("round_robin"), (1.0, 1.0, 1.0))
    assert [fleet.send(request(f"a{n}")) for n in range(4)] == [0, 1, 2, 0]
    fleet.draining = {1}
    assert [fleet.send(request(f"b{n}")) for n in range(3)] == [2, 0, 2]


def test_the_least_loaded_has_the_fewest_sequences_then_the_most_free_blocks():
    router = make_router("least_loaded")
    states = [snapshot(0, num_running=2), snapshot(1, num_waiting=1, num_free=50), snapshot(2, num_running=1)]
    assert router.route(request("r"), states, 0.0) == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lumnix", {}, "unknown router 'lumnix'. Did you mean 'llumnix'"),
        ("hexgen", {"alfa": 0.1}, "unknown option of the router 'hexgen': 'alfa'. Did you mean 'alpha'"),
        ("hexgen", {"alpha": "much"}, "option alpha='much' of the router 'hexgen' must be a float"),
        ("hexgen", {"alpha": 1.1}, "alpha=1.1 must be from 0 to 1"),
        ("hexgen", {"alpha": float("nan")}, "must be a float"),
        ("d2lpm", {"quantum": 0}, "quantum=0 must be a number above 0"),
        ("d2lpm", {"quantum": float("inf")}, "quantum=inf must be a number above 0"),
        ("d2lpm", {"decode_weight": -1}, "must not be negative"),
        ("llumnix", {"urgent_tokens": -1}, "urgent_tokens=-1 must be 0 or more"),
        ("autellix", {"ttl_s": 0}, "ttl_s=0 above 0"),
        ("prefix_affinity", {"least_share": 2.0}, "must be a share"),
        ("round_robin", {"_last": 3}, "unknown option"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_router(name, options)


def test_lists_of_snapshots_that_cannot_be_are_refused():
    router = make_router("least_loaded")
    with pytest.raises(RequestError, match="there are no replicas"):
        router.route(request("r"), [], 0.0)
    with pytest.raises(RequestError, match="all 2 replicas are draining"):
        router.route(request("r"), [snapshot(0, is_draining=True), snapshot(1, is_draining=True)], 0.0)
    with pytest.raises(InvariantError, match="a replica twice"):
        router.route(request("r"), [snapshot(1), snapshot(1)], 0.0)
