"""The engine's counts: the buckets, the gaps between tokens, and the names of clients."""

import pytest

from jaxserve import tally
from jaxserve.histogram import Histogram, one_two_five
from jaxserve.output import CompletionOutput, RequestMetrics, RequestOutput
from jaxserve.request import Request, SamplingParams
from jaxserve.tally import OTHERS, Tally, client_name


def ended(client: str, num_prompt: int = 3, num_answer: int = 2) -> tuple[Request, RequestOutput]:
    request = Request(request_id="r", prompt_token_ids=(1,) * num_prompt, client=client, params=SamplingParams(n=1))
    metrics = RequestMetrics(arrival_s=1.0, started_s=1.5, first_token_s=2.0, finished_s=4.0, num_cached_tokens=1)
    answer = CompletionOutput(index=0, token_ids=[7] * num_answer, finish_reason="length")
    return request, RequestOutput("r", None, [1] * num_prompt, [answer], metrics, finished=True)


def test_a_value_at_a_bound_belongs_below_it_as_in_prometheus():
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 2.5):
        histogram.add(value)
    histogram.add(9, times=3)
    assert histogram.counts == [2, 2, 4]
    assert (histogram.num_values, histogram.total) == (8, 7.5 + 27)


@pytest.mark.parametrize(("largest", "bounds"), [(1, [1]), (100, [1, 2, 5, 10, 20, 50, 100]), (6, [1, 2, 5])])
def test_buckets_for_numbers_of_tokens_are_those_of_vllm(largest, bounds):
    assert list(one_two_five(largest)) == bounds


def test_answers_that_had_a_token_in_the_same_step_share_a_gap():
    counts = Tally(100)
    for _ in range(3):
        counts.token(None)  # first tokens come after nothing
    counts.stepped(30, 10.0)
    assert counts.gap.num_values == 0
    for last_s in (10.0, 10.0, 9.0):
        counts.token(last_s)
    counts.stepped(3, 10.5)
    assert counts.gap.num_values == 3
    assert counts.gap.total == pytest.approx(0.5 + 0.5 + 1.5)
    assert counts.step_tokens.num_values == 2


def test_times_of_a_request_add_up():
    counts = Tally(100)
    counts.ended(*ended("", num_answer=5))
    phases = (counts.queued, counts.prefill, counts.decode)
    assert sum(phase.total for phase in phases) == counts.latency.total == 3.0
    assert counts.inference.total == 2.5
    assert counts.per_token.total == pytest.approx(2.0 / 4)


def test_thousands_of_names_push_each_other_out_and_no_token_is_lost(monkeypatch):
    monkeypatch.setattr(tally, "_MOST_CLIENTS", 10)
    counts = Tally(100)
    for _ in range(50):
        counts.ended(*ended("heavy"))
    for number in range(3000):
        counts.ended(*ended(f"name-{number}"))
    assert len(counts.clients) <= 11
    assert counts.clients["heavy"].requests == 50
    for name, each in (("requests", 1), ("prompt_tokens", 3), ("cached_tokens", 1), ("output_tokens", 2)):
        assert sum(getattr(client, name) for client in counts.clients.values()) == 3050 * each
    assert counts.clients[OTHERS].requests >= 2980


def test_a_name_is_short_and_can_be_encoded():
    assert client_name("") == "none"
    assert len(client_name("x" * 1000)) == 64
    client_name("\ud800").encode()
