"""The table of programs."""

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.scheduler.programs import Programs
from tests.fakes import ask


def table(ttl_s=10.0, gone=None):
    return Programs(lambda now_s: [now_s], ttl_s, forget=None if gone is None else gone.append)


def test_calls_of_a_program_share_a_row_and_requests_without_one_do_not():
    programs = table()
    a, b = (programs.join(ask(f"r{i}", [1], program="p"), float(i)) for i in range(2))
    c, d = (programs.join(ask(f"r{i}", [1]), 5.0) for i in range(2))
    assert a is b
    assert a == [0.0]
    assert c is not d
    assert len(programs) == 3


def test_a_request_called_like_a_program_is_none_of_its_calls():
    programs = table()
    assert programs.join(ask("p", [1]), 0.0) is not programs.join(ask("r", [1], program="p"), 0.0)


def test_a_row_without_a_program_goes_with_its_last_answer():
    programs = table()
    request = ask("r", [1], n=2)
    programs.join(request, 0.0)
    programs.join(request, 0.0)
    programs.leave(request, 1.0)
    assert len(programs) == 1
    programs.leave(request, 1.0)
    assert len(programs) == 0


def test_an_ended_program_goes_with_its_last_call_and_unknown_ones_are_ignored():
    gone = []
    programs = table(gone=gone)
    request = ask("r", [1], program="p")
    row = programs.join(request, 0.0)
    programs.end("p")
    programs.end("never heard of")
    assert len(programs) == 1
    programs.leave(request, 1.0)
    assert len(programs) == 0
    assert gone == [row]


def test_idle_programs_go_after_their_time_and_busy_ones_stay():
    programs = table(ttl_s=10.0)
    busy, idle = ask("r1", [1], program="busy"), ask("r2", [1], program="idle")
    programs.join(busy, 0.0)
    programs.join(idle, 0.0)
    programs.leave(idle, 5.0)
    programs.sweep(14.9)
    assert len(programs) == 2
    programs.sweep(15.0)
    assert len(programs) == 1
    assert programs.join(busy, 20.0) == [0.0]
    assert programs.join(idle, 20.0) == [20.0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.floats(0, 3)), max_size=40))
def test_rows_are_exactly_those_of_live_or_recent_programs(steps):
    programs, now_s, calls, idle_since = table(ttl_s=4.0), 0.0, {}, {}
    for number, begins, passed_s in steps:
        now_s += passed_s
        request = ask("r", [1], program=f"p{number}")
        programs.sweep(now_s)
        if begins:
            programs.join(request, now_s)
            calls[number] = calls.get(number, 0) + 1
        elif calls.get(number):
            programs.leave(request, now_s)
            calls[number] -= 1
            idle_since[number] = now_s
        wanted = [n for n, count in calls.items() if count or now_s - idle_since[n] < 4.0]
        assert len(programs) == len(wanted)
        calls = {n: calls[n] for n in wanted}
