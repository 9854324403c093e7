"""Work-aware dispatch between load and speed."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxserve.cluster.router import make_router
from jaxserve.cluster.routers.hexgen import work_aware
from tests.cluster.fleet import Fleet, request, snapshot

FLEETS = st.lists(st.tuples(st.floats(0.1, 100), st.floats(0, 1000)), min_size=1, max_size=6)  # (service, work)
ALPHA = st.floats(0, 1)


def choose(fleet, alpha):
    states = [snapshot(number, service_s=service, work_s=work) for number, (service, work) in enumerate(fleet)]
    return make_router("hexgen", {"alpha": alpha}).route(request("r"), states, 0.0)


@given(FLEETS)
def test_alpha_0_is_the_least_work_and_alpha_1_the_fastest(fleet):
    assert fleet[choose(fleet, 0.0)][1] == min(work for _, work in fleet)
    assert fleet[choose(fleet, 1.0)][0] == min(service for service, _ in fleet)


@given(FLEETS, ALPHA)
def test_between_them_nobody_is_chosen_who_is_slower_and_busier(fleet, alpha):
    service, work = fleet[choose(fleet, alpha)]
    assert not any(s < service * 0.999 and w < work * 0.999 - 1e-3 for s, w in fleet)


@given(FLEETS, ALPHA, st.sampled_from([0.5, 4.0, 1024.0]))
def test_the_unit_of_time_does_not_matter(fleet, alpha, factor):
    services, works = zip(*fleet, strict=True)
    assume(all(work * factor > 0 for work in works if work))
    same = work_aware([s * factor for s in services], [w * factor for w in works], alpha)
    assert same == pytest.approx(work_aware(services, works, alpha))


@given(ALPHA)
def test_idle_replicas_are_taken_by_speed(alpha):
    assert choose([(2.0, 0.0), (1.0, 0.0)], max(alpha, 1e-6)) == 1


@given(ALPHA, st.integers(1, 20))
def test_work_that_was_sent_is_gone_when_it_has_ended(alpha, count):
    fleet = Fleet(make_router("hexgen", {"alpha": alpha}), (1.0, 3.0))
    old = fleet.snapshots()
    for number in range(count):
        fleet.send(request(f"r{number}"), snapshots=old)
    corrected = fleet.router._corrected(request("r"), old)
    assert sum(s.work_s for s in corrected) == pytest.approx(sum(s.work_s for s in fleet.snapshots()))
    for number in range(count):
        fleet.end(f"r{number}")
    assert [s.work_s for s in fleet.router._corrected(request("r"), fleet.snapshots())] == [0.0, 0.0]
