"""Whole load tests on virtual time: when requests are sent, how many at once, and what the report makes of it."""

import asyncio
import os
import signal

import pytest

from jaxserve.errors import ServerError
from jaxserve.loadgen import dataset
from jaxserve.loadgen.arrivals import random_times
from jaxserve.loadgen.prompts import Prompts, Vocabulary
from jaxserve.loadgen.report import details, report, table
from jaxserve.loadgen.run import Load, check, run_load
from jaxserve.workload.call import After, Call, Said, Span, make_workload
from tests.loadgen.rigs import EVENTS, FakeServer, chunk, on_virtual_time, streamed, text, usage

METRICS = ("ttft", "tpot", "itl", "e2el", "client_queue_time")
PROMPTS = Prompts(Vocabulary(), 0, as_ids=False)


def paced(ttft_s=0.2, gaps=(0.05, 0.05)):
    """An answer at this pace."""
    parts = [(ttft_s, text("a")), *((gap, text("b")) for gap in gaps), (0, text("", "length"))]
    return streamed(*parts, (0, usage(10, 1 + len(gaps))))


def load_of(calls, **options):
    options = {"endpoint": "/v1/completions", "shared": {"stream": True}} | options
    return Load(workload=make_workload("test", calls), prompts=PROMPTS, **options)


def run(load, respond, watch=None):
    """The result, and the server that was asked."""

    async def main():
        async with FakeServer(respond) as server:
            return await run_load(server.client(), load, watch), server

    return on_virtual_time(main)


def calls_at(*times):
    return [Call(call_id=str(n), prompt=(Span(n + 1, 3),), output_tokens=3, arrival_s=t) for n, t in enumerate(times)]


def facts_of(result, **goodput):
    return report(result, metrics=METRICS, percentiles=(90, 99), goodput=goodput)


def test_the_report_is_the_script():
    paces = [(0.1, (0.01, 0.03)), (0.2, (0.02, 0.04)), (0.9, (0.1, 0.1))]
    responses = [paced(*pace) for pace in paces]
    result, server = run(load_of(calls_at(0, 1, 2)), lambda *_: responses.pop(0))
    facts = facts_of(result, ttft=500, tpot=50)
    assert facts["mean_ttft_ms"] == pytest.approx(400)
    assert facts["median_ttft_ms"] == pytest.approx(200)
    assert facts["p90_ttft_ms"] == pytest.approx(200 + 0.8 * 700)
    assert facts["mean_tpot_ms"] == pytest.approx((20 + 30 + 100) / 3)
    assert facts["median_itl_ms"] == pytest.approx(35)
    assert facts["p99_e2el_ms"] == pytest.approx(260 + 0.98 * (1100 - 260))
    assert facts["std_tpot_ms"] == pytest.approx(35.59, abs=0.01)
    assert facts["duration"] == pytest.approx(2 + 1.1)
    assert facts["request_throughput"] == pytest.approx(3 / 3.1)
    assert facts["output_throughput"] == pytest.approx(9 / 3.1)
    assert facts["total_token_throughput"] == pytest.approx(39 / 3.1)
    assert facts["good_completed"] == 2
    assert facts["request_goodput"] == pytest.approx(2 / 3.1)
    assert facts["max_concurrent_requests"] == 1
    assert facts["tokens_per_chunk"] == pytest.approx(1)
    assert (facts["completed"], facts["failed"], facts["unfinished"]) == (3, 0, 0)
    assert server.times == pytest.approx([1000, 1001, 1002])
    shown = table(facts, METRICS)
    assert "3 of 3" in shown
    assert "between chunks" in shown
    assert "goodput, requests/s (ttft 500 ms, tpot 50 ms)" in shown
    assert details(result)["ttfts"] == pytest.approx([0.1, 0.2, 0.9])
    assert details(result)["itls"][2] == pytest.approx([0.1, 0.1])


def test_concurrency_is_bounded_and_waiting_is_told():
    result, server = run(load_of(calls_at(0, 0, 0, 0, 0), max_concurrency=2), lambda *_: paced())
    facts = facts_of(result)
    assert server.most_under_way == facts["max_concurrent_requests"] == 2
    assert server.connections == 2
    assert facts["median_client_queue_time_ms"] == pytest.approx(300)
    assert facts["mean_ttft_ms"] == pytest.approx(200)  # from when it was sent
    assert facts["duration"] == pytest.approx(0.9)


def test_errors_are_counted_and_measured_nowhere():
    def respond(_, body):
        number = len(body["prompt"])
        good, busy = paced(), (429, {"Content-Length": "4"}, [(0, b"busy")])
        return {3: good, 4: busy, 5: (200, EVENTS, [(5, chunk(text("a"))), None])}[number]

    calls = [Call(call_id=str(n), prompt=(Span(n + 1, 1),), output_tokens=3) for n in range(6)]
    prompts = Prompts(Vocabulary(), 0, as_ids=False, texts={str(n): "x" * (3 + n % 3) for n in range(6)})
    load = Load(workload=make_workload("w", calls), prompts=prompts, endpoint="/v1/completions", shared={})
    result, _ = run(load, respond)
    facts = facts_of(result)
    assert facts["errors_by_kind"] == {"HTTP 429": 2, "connection broke": 2}
    assert facts["error_examples"]["HTTP 429"] == "busy"
    assert (facts["completed"], facts["failed"]) == (2, 4)
    assert facts["mean_ttft_ms"] == pytest.approx(200)
    assert "failed: HTTP 429" in table(facts, METRICS)
    assert "HTTP 429: busy" in table(facts, METRICS)


def test_nothing_but_errors_has_no_figures():
    result, _ = run(load_of(calls_at(0, 0)), lambda *_: (500, {"Content-Length": "0"}, []))
    facts = facts_of(result, ttft=1)
    assert "mean_ttft_ms" not in facts
    assert facts["request_goodput"] == 0
    assert "0 of 2" in table(facts, METRICS)


def test_calls_wait_for_those_before_them_and_say_what_they_said():
    calls = [
        Call(call_id="a", prompt=(Span(1, 4),), output_tokens=3),
        Call(call_id="b", prompt=(After("a"), Span(2, 2)), output_tokens=3, parents=("a",), think_s=2.0),
        Call(call_id="c", prompt=(Said("b"),), output_tokens=3, parents=("b",), client="me", deadline_s=1.5),
    ]
    result, server = run(load_of(calls, with_meta=True), lambda *_: paced())
    assert server.times == pytest.approx([1000, 1002.3, 1002.6])
    first, second, third = (body["prompt"] for body in server.bodies)
    assert len(first.split()) == 4
    assert second.startswith(first + "abb ")
    assert third == "abb"
    assert server.bodies[2] | {"prompt": ""} == {
        "prompt": "",
        "max_tokens": 3,
        "stream": True,
        "client": "me",
        "parents": ["b"],
        "deadline_ms": 1500,
    }
    assert facts_of(result)["completed"] == 3


def test_what_waits_for_a_failure_is_not_sent():
    calls = [
        Call(call_id="a", prompt=(Span(1, 4),), output_tokens=3),
        Call(call_id="b", prompt=(After("a"),), output_tokens=3, parents=("a",)),
        Call(call_id="c", prompt=(After("b"),), output_tokens=3, parents=("b",)),
    ]
    result, server = run(load_of(calls), lambda *_: (500, {"Content-Length": "0"}, []))
    facts = facts_of(result)
    assert (len(server.bodies), facts["failed"], facts["unsent"], facts["unfinished"]) == (1, 1, 2, 0)


def test_an_interrupt_leaves_what_there_is():
    def watch(_):
        os.kill(os.getpid(), signal.SIGINT)

    result, _ = run(load_of(calls_at(0, 0.1, 50)), lambda *_: paced(), watch)
    facts = facts_of(result)
    assert facts["is_partial"]
    assert (facts["completed"], facts["unfinished"]) == (1, 2)
    assert facts["duration"] == pytest.approx(0.3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_whoever_cancels_the_run_is_obeyed():
    async def main():
        async with FakeServer(lambda *_: paced(ttft_s=100)) as server:
            task = asyncio.ensure_future(run_load(server.client(), load_of(calls_at(0))))
            await asyncio.sleep(1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    on_virtual_time(main)


@pytest.mark.parametrize(
    ("response", "told"),
    [
        ((404, {"Content-Length": "9"}, [(0, b"no such x")]), "/v1/completions refuses: HTTP 404, no such x"),
        ((401, {"Content-Length": "0"}, []), "HTTP 401"),
        ((200, EVENTS, [None]), "no server answers at http://127.0.0.1"),
        (paced(), None),
    ],
)
def test_a_mistake_is_told_by_one_request(response, told):
    async def main():
        async with FakeServer(lambda *_: response) as server:
            await check(server.client(), load_of(calls_at(0)))
            return server.bodies

    if told is None:
        assert on_virtual_time(main) == [{"prompt": " the", "max_tokens": 1, "stream": True}]
    else:
        with pytest.raises(ServerError) as caught:
            on_virtual_time(main)
        assert told in str(caught.value)


def test_a_poisson_load_is_sent_when_it_is_due():
    times = random_times(40, rate=5, burstiness=1, seed=3)
    lengths = dataset.Lengths(prompt=5, answer=3)
    load = load_of(dataset.random_calls(40, lengths, times, seed=3).calls)
    result, server = run(load, lambda *_: paced())
    assert [t - 1000 for t in server.times] == pytest.approx(times)
    facts = facts_of(result)
    assert facts["p99_client_queue_time_ms"] == pytest.approx(0, abs=1e-6)
    assert facts["max_concurrent_requests"] == server.most_under_way > 1
