"""Generated workloads: what they promise, and that a seed fixes them."""

import itertools
import math
import statistics
from random import Random

import pytest

from jaxserve.errors import ConfigError
from jaxserve.workload.call import After, Said, Span
from jaxserve.workload.generate import WORKLOADS, generate
from jaxserve.workload.lengths import Even, Lognormal, Pareto, arrivals
from jaxserve.workload.programs import STAGES


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_gives_the_same_calls_and_another_gives_others(name):
    one, same, other = (generate(name, count=5, rate=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name != "documents"])
def test_arrivals_follow_the_rate(name):
    workload = generate(name, count=400, rate=5.0, options={"rounds": 1} if name == "tree-search" else None)
    first = dict[str, float]()
    for call in workload.calls:
        if not call.parents:
            first.setdefault(call.program or call.call_id, call.arrival_s)
    assert len(first) == 400
    assert max(first.values()) == pytest.approx(80, rel=0.2)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_times_between_arrivals_vary_as_asked(cv):
    times = arrivals(Random(1), 20_000, 4.0, cv)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.08)
    assert statistics.pstdev(gaps) == pytest.approx(0.25 * cv, rel=0.1, abs=1e-9)


def test_lengths():
    rng = Random(1)
    assert statistics.median(Lognormal(100, 0.8).draw(rng) for _ in range(5000)) == pytest.approx(100, rel=0.06)
    assert {Even(3, 5).draw(rng) for _ in range(100)} == {3, 4, 5}
    tail = [Pareto(0.9, 16, 6000).draw(rng) for _ in range(5000)]
    assert min(tail) == 16 and max(tail) == 6000
    assert statistics.median(tail) == pytest.approx(16 * 2 ** (1 / 0.9), rel=0.06)


def test_a_turn_of_a_chat_continues_the_one_before():
    for call in generate("chat", count=20, rate=1.0).calls:
        before, message = call.prompt
        assert isinstance(message, Span)
        assert before == After(call.parents[0]) if call.parents else isinstance(before, Span)
        assert bool(call.think_s) == bool(call.parents)


def test_tree_search_makes_as_many_calls_as_was_measured():
    calls = generate("tree-search", count=3, rate=1.0).calls
    assert len(calls) == 3 * 160
    judged = [call for call in calls if call.stage == "judge"]
    assert all(call.prompt[0] == After(call.parents[0]) for call in judged)
    later = [call for call in calls if call.stage == "expand" and call.parents]
    assert all(len(call.parents) == 5 for call in later), "a round waits for all judgements of the one before"


def test_map_reduce_merges_all_answers():
    calls = generate("map-reduce", count=10, rate=1.0).calls
    merges = [call for call in calls if call.stage == "reduce"]
    assert len(merges) == 10
    for merge in merges:
        assert merge.prompt[1:] == tuple(map(Said, merge.parents)) and 8 <= len(merge.parents) <= 32
    chained = generate("map-reduce", count=40, rate=1.0, options={"chain_share": 1.0}).calls
    assert {call.stage for call in chained} == {""}


def test_text_to_sql_has_the_published_lengths():
    calls = generate("text-to-sql", count=200, rate=1.0).calls
    for stage, (prompt, answer) in STAGES.items():
        some = [call for call in calls if call.stage == stage]
        assert statistics.fmean(sum(p.length for p in call.prompt) for call in some) == pytest.approx(prompt, rel=0.05)
        assert statistics.fmean(call.output_tokens for call in some) == pytest.approx(answer, rel=0.05)
    assert all(call.deadline_s == 52.95 for call in calls)


def test_the_first_tenant_asks_most():
    calls = generate("tenants", count=2000, rate=1.0).calls
    counts = [sum(call.client == f"client{n}" for call in calls) for n in range(6)]
    assert counts[0] / statistics.fmean(counts[1:]) == pytest.approx(4, rel=0.2)
    assert len({call.prompt[0] for call in calls}) == 36


def test_all_questions_about_a_document_share_it():
    calls = generate("documents", count=30).calls
    assert len(calls) == 240 and {call.arrival_s for call in calls} == {0.0}
    texts = [call.prompt[0] for call in calls]
    assert all(texts.count(text) == 8 for text in set(texts))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("chats", {}, "unknown workload 'chats'. Did you mean 'chat'"),
        ("chat", {"options": {"turn": 3}}, "unknown option of the workload 'chat': 'turn'. Did you mean 'turns'"),
        ("chat", {"options": {"turns": "many"}}, "option turns='many' of the workload 'chat' must be like 4.0"),
        ("chat", {"options": {"turns": math.nan}}, "option turns=nan"),
        ("chat", {"options": {"system": 1.5}}, "option system=1.5"),
        ("chat", {"options": {"rng": 1}}, "unknown option"),
        ("tenants", {"options": {"clients": 0}}, "option clients=0 of the workload 'tenants' must be at least 1"),
        ("sharegpt", {"options": {"prompt": ["lognormal", 5]}}, "option prompt=.* must be like Lognormal"),
        ("sharegpt", {"options": {"prompt": ["even", 9, 5]}}, "option prompt="),
        ("sharegpt", {"options": {"prompt": 0}}, "option prompt=0"),
        ("sharegpt", {"rate": -1.0}, "rate=-1.0 must be a positive number"),
        ("sharegpt", {"rate": math.nan}, "rate=nan must be"),
        ("sharegpt", {"options": {"cv": -1}}, "option cv=-1"),
        ("sharegpt", {"count": 0}, "0 programs; give a whole number from 1"),
    ],
)
def test_what_cannot_be_generated_is_told(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        generate(name, **{"count": 3, "rate": 1.0} | arguments)


def test_options_of_lengths():
    calls = generate("sharegpt", count=50, options={"prompt": 7, "answer": ["even", 2, 3]}).calls
    assert {call.prompt[0].length for call in calls} == {7}
    assert {call.output_tokens for call in calls} == {2, 3}
