"""The longest cached prefix, unless it is short or loads have drifted apart."""

import pytest

from jaxserve.cluster.router import make_router
from tests.cluster.fleet import request, snapshot


@pytest.mark.parametrize(
    ("states", "chosen"),
    [
        ([(5, 0), (9, 50)], 1),  # (sequences, cached): the longest prefix,
        ([(5, 0), (9, 30)], 0),  # if it is more than 0.3 of the prompt
        ([(5, 0), (9, 31)], 1),
        ([(5, 60), (9, 60), (1, 40)], 0),  # of equals the least used
        ([(5, 0), (70, 90)], 0),  # more than 64 apart, and 1.5 times as many
        ([(5, 0), (69, 90)], 1),  # not that far
        ([(200, 0), (290, 90)], 1),  # far, but not 1.5 times as many
        ([(3, 0), (2, 0)], 1),  # nothing cached
    ],
)
def test_prefix_and_load(states, chosen):
    snapshots = [snapshot(number, num_running=n, cached=cached) for number, (n, cached) in enumerate(states)]
    assert make_router("prefix_affinity").route(request("r", 100), snapshots, 0.0) == chosen
