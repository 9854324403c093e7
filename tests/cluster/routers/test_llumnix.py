"""Freeness: tokens left for each sequence, with room kept for urgent ones."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cluster.router import make_router
from jaxserve.cluster.routers.llumnix import freeness
from tests.cluster.fleet import Fleet, request, snapshot


def choose(*states, **values):
    return make_router("llumnix").route(request("r", **values), states, 0.0)


def test_an_empty_replica_is_infinitely_free():
    assert freeness(snapshot()) == math.inf
    assert freeness(snapshot(num_free=0), 1000) == math.inf
    assert choose(snapshot(0, num_running=1), snapshot(1, num_free=1)) == 1
    assert choose(snapshot(0, num_free=50), snapshot(1)) == 1  # of two empty ones the larger pool


@pytest.mark.parametrize(
    ("values", "tokens"),
    [
        ({"num_running": 4, "num_free": 60}, 60 * 16 / 4),
        ({"num_running": 3, "num_waiting": 1, "num_free": 60, "waiting_blocks": 20}, 40 * 16 / 4),
        ({"num_waiting": 2, "waiting_blocks": 150}, -50 * 16),
    ],
)
def test_freeness_is_what_is_left_for_each_sequence_if_the_waiting_run(values, tokens):
    assert freeness(snapshot(**values)) == tokens


@given(st.integers(0, 100), st.integers(1, 8), st.integers(0, 50))
def test_each_request_that_is_sent_makes_its_replica_less_free(free, running, waiting):
    state = snapshot(num_free=free, num_running=running, num_waiting=1, waiting_blocks=waiting)
    router = make_router("llumnix")
    router.route(request("a", 30), [state], 0.0)
    (after,) = router._corrected(request("b"), [state])
    assert after.waiting_blocks == state.waiting_blocks + 2
    assert freeness(after) < freeness(state)


def test_of_full_replicas_the_one_that_lacks_least_is_freest_and_as_published_the_one_with_the_longest_queue():
    short = snapshot(0, num_running=5, num_free=0, num_waiting=1, waiting_blocks=10)
    long = snapshot(1, num_running=5, num_free=0, num_waiting=20, waiting_blocks=30)
    assert choose(short, long) == 0
    published = make_router("llumnix", {"divides_shortage": True})
    assert published.route(request("r"), [short, long], 0.0) == 1
    assert freeness(short, divides_shortage=True) == -10 * 16 / 6


def test_others_stay_away_from_a_replica_with_urgent_requests_as_if_it_were_nearly_full():
    # 1,600 tokens are 100 blocks: of a pool of 400, 300 count as used.
    urgent = snapshot(0, num_blocks=400, num_free=390, num_running=1, num_urgent=1)
    busy = snapshot(1, num_blocks=400, num_free=200, num_running=2)
    assert freeness(urgent) > freeness(busy)
    assert choose(urgent, busy) == 1
    assert choose(urgent, busy, priority=-1) == 0  # urgent requests do not keep away from each other
    full = snapshot(1, num_blocks=400, num_free=20, num_running=10)
    assert choose(urgent, full) == 0  # 90 blocks for one are more than 2 for each of ten


def test_draining_replicas_are_never_chosen_however_free():
    fleet = Fleet(make_router("llumnix"))
    fleet.draining = {0}
    assert {fleet.send(request(f"r{number}", 500)) for number in range(6)} == {1}
