"""Long calls stay with their program's context, short ones go where there is room."""

import pytest

from jaxserve.cluster.router import make_router
from tests.cluster.fleet import request, snapshot


class Calls:
    """Calls of programs to two replicas of which `busy` runs ten sequences."""

    def __init__(self, **options):
        self.router = make_router("autellix", options)
        self.count = 0

    def __call__(self, program, tokens, busy, now_s=0.0, draining=()):
        states = [
            snapshot(
                replica,
                num_accepted=self.count,
                num_running=10 * (replica == busy),
                is_draining=replica in draining,
                num_blocks=1000,
                num_free=900,
            )
            for replica in range(2)
        ]
        self.count += 1
        return self.router.route(request(f"r{self.count}", tokens, program=program), states, now_s)


def test_long_calls_stay_short_ones_do_not():
    call = Calls()
    assert call("p", 2049, busy=0) == 1
    assert call("p", 2049, busy=1) == 1
    assert call("p", 2048, busy=1) == 0
    assert call("q", 2049, busy=1) == 0  # pins are each program's own
    assert call("", 2049, busy=1) == 0  # without a program there is nothing to stay with
    assert call("", 2049, busy=0) == 1


def test_a_pin_moves_when_its_replica_drains():
    call = Calls()
    assert call("p", 3000, busy=0) == 1
    assert call("p", 3000, busy=0, draining=[1]) == 0
    assert call("p", 3000, busy=0) == 0


@pytest.mark.parametrize(("later_s", "chosen"), [(600.0, 1), (600.1, 0)])
def test_a_pin_ends_after_a_time_without_use(later_s, chosen):
    call = Calls()
    assert call("p", 3000, busy=0) == 1
    assert call("p", 3000, busy=1, now_s=later_s) == chosen


def test_each_use_keeps_the_pin_alive():
    call = Calls(ttl_s=10.0)
    assert call("p", 3000, busy=0) == 1
    assert [call("p", 3000, busy=1, now_s=now_s) for now_s in (8.0, 16.0, 24.0)] == [1, 1, 1]


def test_a_pin_in_use_keeps_no_other_alive():
    call = Calls(ttl_s=10.0)
    assert [call(program, 3000, busy=0) for program in ("p", "q")] == [1, 1]
    assert call("p", 3000, busy=0, now_s=8.0) == 1
    assert call("q", 3000, busy=1, now_s=16.0) == 0


def test_pins_end_with_their_program_and_leave_nothing():
    call = Calls()
    call("p", 3000, busy=0)
    call.router.end_program("p")
    call.router.end_program("unknown")
    assert not call.router._rule._pins
    assert call("p", 3000, busy=1) == 0


def test_many_programs_do_not_pile_up():
    call = Calls(ttl_s=10.0)
    for number in range(100):
        call(f"p{number}", 3000, busy=0, now_s=float(number))
    assert len(call.router._rule._pins) <= 11
