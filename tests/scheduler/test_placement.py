"""Which replica takes the next sequence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.scheduler.placement import Offer, rank


def best(*offers: tuple[int, int, int], num_slots: int = 32) -> int:
    """The replica that is chosen; offers are (sequences that run, prompt tokens ahead, tokens cached)."""
    return rank([Offer(replica, *numbers) for replica, numbers in enumerate(offers)], num_slots)[0].replica


@pytest.mark.parametrize(
    ("offers", "chosen"),
    [
        ([(0, 0, 0), (0, 0, 0)], 0),  # all alike: the first
        ([(2, 0, 0), (1, 0, 0)], 1),  # nothing cached: where fewer run
        ([(0, 0, 32), (0, 0, 64)], 1),  # where most is cached,
        ([(0, 0, 0), (8, 0, 32)], 1),  # also when a few more run there,
        ([(0, 0, 0), (9, 0, 500)], 0),  # but not when many more do,
        ([(0, 0, 0), (0, 100, 64)], 0),  # nor to wait for more than is spared
        ([(0, 0, 0), (0, 63, 64)], 1),
        ([(0, 300, 0), (3, 200, 0)], 1),  # nothing cached: the shorter queue of prompts, not of sequences
        ([(9, 0, 0), (9, 0, 0), (0, 1000, 0)], 2),
    ],
)
def test_the_cached_prefix_wins_unless_its_replica_is_clearly_fuller(offers, chosen):
    assert best(*offers) == chosen


def test_with_one_slot_each_any_more_is_clearly_fuller():
    assert best((0, 0, 0), (1, 0, 999), num_slots=1) == 0


OFFERS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=5)


@given(OFFERS, st.integers(1, 16))
def test_no_offer_is_lost_and_more_of_the_same_is_never_worse(numbers, num_slots):
    offers = [Offer(replica, *values) for replica, values in enumerate(numbers)]
    ranked = rank(offers, num_slots)
    assert sorted(ranked) == sorted(offers)
    place = {offer.replica: index for index, offer in enumerate(ranked)}
    for offer in offers:
        more = [o if o is not offer else offer._replace(num_cached=offer.num_cached + 1) for o in offers]
        after = [o.replica for o in rank(more, num_slots)]
        assert after.index(offer.replica) <= place[offer.replica]
