"""The object behind the page's gauges."""

import json

import pytest

from jaxserve.clock import VirtualClock
from jaxserve.server.stats import Stats


def metrics(**changes):
    """What an engine says of itself, as far as it matters here."""
    idle = {"output_tokens": 0, "prompt_tokens": 0, "cached_tokens": 0, "num_running": 0, "num_waiting": 0}
    return idle | {"kv_blocks_held": 0, "num_kv_blocks": 100, "replica_tokens": [0]} | changes


def test_an_idle_server_knows_no_rates_and_no_share_of_hits():
    figures = Stats("toy", VirtualClock()).read(metrics())
    assert figures["output_tokens_per_s"] is figures["prompt_tokens_per_s"] is figures["cached_share"] is None
    assert (figures["running"], figures["waiting"], figures["kv_share"], figures["requests"]) == (0, 0, 0.0, [])


def test_rates_and_shares_are_those_of_the_counters():
    clock = VirtualClock()
    stats = Stats("toy", clock)
    stats.read(metrics(output_tokens=100))
    clock.advance(2.0)
    figures = stats.read(
        metrics(output_tokens=150, prompt_tokens=30, cached_tokens=90, kv_blocks_held=25, num_running=3, num_waiting=1)
    )
    assert figures["output_tokens_per_s"] == pytest.approx(25.0)
    assert figures["prompt_tokens_per_s"] == pytest.approx(15.0)
    assert figures["cached_share"] == pytest.approx(0.75)
    assert figures["kv_share"] == pytest.approx(0.25)
    assert (figures["running"], figures["waiting"], figures["now_s"]) == (3, 1, 2.0)


def test_memory_of_all_replicas_counts():
    figures = Stats("toy", VirtualClock()).read(metrics(kv_blocks_held=100, replica_tokens=[5, 6]))
    assert figures["kv_share"] == pytest.approx(0.5)


def test_what_is_read_is_json():
    json.dumps(Stats("toy", VirtualClock()).read(metrics()), allow_nan=False)
