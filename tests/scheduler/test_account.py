"""What is written down for each client, whatever clients call themselves, and how many of their sequences may run."""

import random

import pytest

from jaxserve.scheduler import account
from jaxserve.scheduler.account import Accounts
from tests.fakes import ask, make_engine

NAMES = ["", "x" * 100_000, "\x00\n\u202e'; DROP TABLE", "é" * 500, "0", " "]


@pytest.mark.parametrize("policy", ["fcfs", "vtc", "dlpm"])
def test_totals_are_those_of_what_each_client_asked_for(policy):
    rig = make_engine(policy=policy, num_blocks=12, max_model_len=40, num_slots=4)
    rng = random.Random(4)
    requests = [
        ask(
            f"r{i}",
            [rng.randrange(1, 19) for _ in range(rng.randint(1, 15))],
            client=rng.choice(NAMES),
            max_tokens=rng.randint(1, 20),
            n=rng.choice((1, 2)),
            ignore_eos=True,
        )
        for i in range(40)
    ]
    outputs = rig.run(*requests)
    accounts = rig.scheduler.accounts.as_dict()
    assert set(accounts) == {r.client for r in requests}
    for client, totals in accounts.items():
        mine = [r for r in requests if r.client == client]
        assert totals["sequences"] == totals["finished"] == sum(r.params.n for r in mine)
        assert totals["output_tokens"] == sum(r.params.n * r.params.max_tokens for r in mine)
        assert totals["preemptions"] == sum(outputs[r.request_id].metrics.num_preemptions for r in mine)
        assert totals["aborted"] == totals["num_running"] == 0
        fed, cached = totals["prompt_tokens"], totals["cached_tokens"]
        once = sum(r.params.n * len(r.prompt_token_ids) for r in mine)
        assert fed + cached == once if not totals["preemptions"] else fed + cached > once
    assert rig.scheduler.counters.preemptions > 0


@pytest.mark.parametrize("quota", [1, 2, 5])
def test_no_client_ever_runs_more_sequences_than_its_quota_and_others_take_the_room(quota):
    rig = make_engine(num_slots=6, num_blocks=200, client_quota=quota)
    for index in range(12):
        rig.engine.add(ask(f"a{index}", [1, index + 1], client="a", max_tokens=6, n=1 + index % 2, ignore_eos=True))
    for index in range(2):
        rig.engine.add(ask(f"b{index}", [2, index + 1], client=NAMES[1], max_tokens=6, ignore_eos=True))
    seen = set()
    while rig.engine.has_work:
        rig.step()
        running = [s.request.client for s in rig.scheduler._running]
        seen.add((running.count("a"), running.count(NAMES[1])))
    assert max(a for a, _ in seen) == quota
    assert (quota, min(2, quota, 6 - quota)) in seen, "b came late, and waited for a"
    rig.check_empty()


def test_of_very_many_clients_those_that_have_not_asked_for_longest_are_forgotten(monkeypatch):
    monkeypatch.setattr(account, "_MOST_CLIENTS", 10)
    accounts = Accounts()
    busy = accounts.of("busy")
    busy.sequences += 1
    for index in range(50):
        accounts.of(f"c{index}")
    known = list(accounts.as_dict())
    assert "busy" in known, "a client with a request under way is never forgotten"
    assert {f"c{index}" for index in range(42, 50)} <= set(known)
    assert len(known) <= 11
    assert accounts.of("busy") is busy
