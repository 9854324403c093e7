"""Rates over a window that slides."""

import pytest

from jaxserve.server.rates import Rates


def test_a_single_reading_has_no_rate():
    assert Rates().read({"tokens": 10}, 1.0) == {"tokens": None}


def test_a_rate_is_what_was_added_over_the_time_since_the_oldest_reading():
    rates = Rates(window_s=5.0)
    found = [rates.read({"tokens": tokens}, now_s)["tokens"] for now_s, tokens in [(0, 0), (1, 10), (2, 40), (4, 40)]]
    assert found == [None, 10.0, 20.0, 10.0]


def test_readings_beyond_the_window_are_forgotten():
    rates = Rates(window_s=5.0)
    rates.read({"tokens": 0}, 0.0)
    rates.read({"tokens": 1000}, 4.0)
    assert rates.read({"tokens": 1010}, 6.0)["tokens"] == pytest.approx(5.0)
    assert rates.read({"tokens": 1010}, 60.0)["tokens"] is None  # nobody has looked for long


def test_two_who_ask_at_one_instant_are_told_the_same():
    rates = Rates()
    rates.read({"tokens": 0}, 0.0)
    first = rates.read({"tokens": 8}, 2.0)
    assert rates.read({"tokens": 8}, 2.0) == first == {"tokens": 4.0}


def test_many_who_ask_often_do_not_make_it_grow():
    rates = Rates(window_s=1.0)
    for i in range(10_000):
        assert rates.read({"tokens": i}, i / 1000)["tokens"] in (None, pytest.approx(1000))
    assert rates.num_readings < 200
