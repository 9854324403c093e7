"""The search for the highest rate that is met."""

import pytest

from jaxserve.sim.sweep import PRECISION, Trial, highest_rate


@pytest.mark.parametrize("edge", [0.013, 0.9, 1.0, 7.7, 300.0])
@pytest.mark.parametrize("start", [0.1, 1.0, 50.0])
def test_the_edge_is_found(edge, start):
    found = highest_rate(lambda rate: Trial(rate, 1.0 if rate <= edge else 0.0, False), 0.9, start)
    assert found.is_bound
    assert edge / (1 + PRECISION) <= found.rate <= edge
    assert len(found.trials) < 25


def test_nothing_is_met():
    found = highest_rate(lambda rate: Trial(rate, 0.5, False), 0.9)
    assert found.rate == 0.0


def test_a_burst_that_is_met_says_nothing_of_higher_rates():
    found = highest_rate(lambda rate: Trial(rate, 1.0, rate >= 8), 0.9)
    assert (found.rate, found.is_bound, len(found.trials)) == (8.0, False, 4)


def test_a_share_that_goes_up_and_down_still_gives_a_rate_that_is_met():
    shares = {}

    def run_at(rate: float) -> Trial:
        shares[rate] = 0.95 if rate < 3 or 3.4 < rate < 3.6 else 0.5
        return Trial(rate, shares[rate], False)

    found = highest_rate(run_at, 0.9)
    assert shares[found.rate] >= 0.9
