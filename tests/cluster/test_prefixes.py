"""The index of prompts that are being computed."""

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.cluster.prefixes import Prefixes
from tests.cluster.fleet import request

CHUNK = 32
PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=4).map(
    lambda chunks: [c for c in chunks for _ in range(CHUNK)]
)
LIVE = st.lists(st.tuples(PROMPTS, st.integers(0, 2), st.sampled_from(["", "other"])), max_size=8)


def common(left, right):
    """Whole chunks that two prompts begin with."""
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count // CHUNK * CHUNK


@given(LIVE, PROMPTS, st.sets(st.integers(0, 7)))
def test_the_longest_common_beginning_with_live_requests_of_each_replica(live, prompt, ended):
    index = Prefixes()
    for number, (tokens, replica, namespace) in enumerate(live):
        index.add(request(str(number), tokens, namespace=namespace), replica)
    for number in ended & set(range(len(live))):
        index.remove(str(number))
    expected = dict[int, int]()
    for number, (tokens, replica, namespace) in enumerate(live):
        if number not in ended and not namespace and common(tokens, prompt):
            expected[replica] = max(expected.get(replica, 0), min(common(tokens, prompt), len(prompt) - 1))
    assert index.matches(request("new", prompt)) == expected


def test_nothing_is_left_when_all_have_ended():
    index = Prefixes()
    for number in range(3):
        index.add(request(str(number), [1] * 100), number % 2)
    for number in range(3):
        index.remove(str(number))
    assert not index._counts
    assert not index._live
