"""Quotas: what each client may ask for, by a clock of ours."""

import random
from types import SimpleNamespace

import pytest

from jaxserve.server.buckets import Quotas


class FakeStream:
    """As much of a stream as an account looks at."""

    def __init__(self, num_prompt):
        self.request = SimpleNamespace(prompt_token_ids=range(num_prompt))
        self.output = None
        self.is_ended = False

    def write(self, *lengths):
        self.output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=range(n)) for n in lengths])


def test_requests_of_a_minute_come_at_once_and_then_evenly():
    quotas = Quotas(requests_per_minute=6)
    taken = []
    for tenth in range(1200):
        now_s = tenth / 10
        if quotas.enter("ada", now_s) is None:
            quotas.leave("ada", now_s)
            taken.append(now_s)
    assert taken[:6] == [0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert taken[6:] == pytest.approx(range(10, 120, 10), abs=0.11), "one each ten seconds"


def test_a_refusal_says_when_to_come_back_and_then_it_is_taken():
    quotas = Quotas(requests_per_minute=2)
    assert [quotas.enter("ada", 0.0) for _ in range(2)] == [None, None]
    refusal = quotas.enter("ada", 0.0)
    assert refusal.code == "rate_limit_exceeded"
    assert refusal.wait_s == pytest.approx(30)
    assert quotas.enter("ada", refusal.wait_s - 0.1) is not None
    assert quotas.enter("ada", refusal.wait_s + 0.1) is None
    assert quotas.num_refused == {"rate_limit_exceeded": 2}


def test_clients_do_not_use_up_what_others_have():
    quotas = Quotas(requests_per_minute=1, max_concurrency=1)
    assert quotas.enter("ada", 0.0) is None
    assert quotas.enter("ada", 0.0) is not None
    assert quotas.enter("bob", 0.0) is None


def test_places_are_given_back():
    quotas = Quotas(max_concurrency=2)
    assert [quotas.enter("ada", 0.0) for _ in range(2)] == [None, None]
    assert quotas.enter("ada", 0.0).code == "concurrency_limit_exceeded"
    quotas.leave("ada", 1.0)
    assert quotas.enter("ada", 1.0) is None
    assert quotas.num_open("ada") == 2


def test_tokens_are_paid_as_they_come_and_debts_over_time():
    quotas, stream = Quotas(tokens_per_minute=60), FakeStream(40)
    assert quotas.enter("ada", 0.0) is None
    quotas.follow("ada", stream)
    assert dict(quotas.headers("ada", 0.0))[b"x-ratelimit-remaining-tokens"] == b"20"
    stream.write(30, 20)  # n=2: 90 tokens in all
    refusal = quotas.enter("ada", 0.0)
    assert refusal is not None
    assert refusal.wait_s == pytest.approx(31)
    stream.is_ended = True
    quotas.leave("ada", 10.0)
    assert quotas.enter("ada", 29.0) is not None
    assert quotas.enter("ada", 31.1) is None


def test_headers_have_openais_names():
    quotas = Quotas(requests_per_minute=60, tokens_per_minute=600)
    quotas.enter("ada", 0.0)
    quotas.follow("ada", FakeStream(100))
    assert dict(quotas.headers("ada", 0.0)) == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"1.000s",
        b"x-ratelimit-limit-tokens": b"600",
        b"x-ratelimit-remaining-tokens": b"500",
        b"x-ratelimit-reset-tokens": b"10.000s",
    }


def test_no_client_gets_more_than_its_share_and_accounts_are_forgotten():
    quotas, rng, now_s = Quotas(requests_per_minute=30, max_concurrency=3), random.Random(0), 0.0
    open_, taken = [], dict.fromkeys("abc", 0)
    for _ in range(5000):
        now_s += rng.expovariate(5)
        client = rng.choice("abc")
        if quotas.enter(client, now_s) is None:
            taken[client] += 1
            open_.append(client)
        assert all(quotas.num_open(c) == open_.count(c) <= 3 for c in "abc")
        if open_ and rng.random() < 0.7:
            quotas.leave(open_.pop(rng.randrange(len(open_))), now_s)
    assert all(count <= 30 + now_s / 2 + 1 for count in taken.values())
    assert all(count > 0.8 * now_s / 2 for count in taken.values()), "hardly anything came in, so nothing was shown"
    for client in open_:
        quotas.leave(client, now_s)
    for client in "abc":
        quotas.enter(client, now_s + 1000)
        quotas.leave(client, now_s + 2000)
    assert not quotas._accounts
