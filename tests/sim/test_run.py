"""Whole simulations: laws of the executor, the engine's own plans, time, programs, replicas, interruption."""

import dataclasses
import itertools
import os
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.clock import VirtualClock
from jaxserve.engine import Engine
from jaxserve.executor.ladder import build_ladder
from jaxserve.kv.store import KVStore
from jaxserve.request import Request, SamplingParams
from jaxserve.scheduler.core import Scheduler
from jaxserve.scheduler.make import make_policy
from jaxserve.scheduler.policies.fcfs import Fcfs
from jaxserve.scheduler.policy import Policy
from jaxserve.scheduler.swap import swap_rule
from jaxserve.sim.executor import Answer, SimExecutor
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.sim.run import Run, simulate
from jaxserve.step import RowResult, StepPlan
from jaxserve.workload.call import END, After, Said, Span, Workload
from jaxserve.workload.generate import generate
from tests.fakes import FakeExecutor
from tests.sim.rigs import SLOW, call, cost, spec, work


class Watched(SimExecutor):
    """Times and tokens of the simulator; plans are kept, and a FakeExecutor refuses those that break a law."""

    plans: list[StepPlan]

    def dispatch(self, plan):
        if not hasattr(self, "plans"):
            self.plans, self.fake = [], FakeExecutor(self.capacity())
        self.plans.append(plan)
        told = self.fake.dispatch(plan)
        pending = super().dispatch(plan)
        self.told = {**getattr(self, "told", {}), id(pending): told}
        return pending

    def collect(self, pending):
        self.fake.collect(self.told.pop(id(pending)))
        return super().collect(pending)


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    monkeypatch.setattr("jaxserve.sim.replica.SimExecutor", Watched)


def plans_of(run: Run) -> list[StepPlan]:
    (replica,) = run.replicas
    return replica.executor.plans


SMALL = {"num_blocks": 40, "max_num_seqs": 6, "token_budget": 32, "num_host_blocks": 24, "max_model_len": 200}


def traffic(seed: int, count: int = 16) -> Workload:
    options = {"clients": 3, "documents": 2, "document": 40, "question": ["even", 1, 30], "answer": ["even", 1, 60]}
    return generate("tenants", count=count, rate=20.0, seed=seed, options=options)


@settings(max_examples=4)
@given(seed=st.integers(0, 10**6), overlap=st.booleans(), mode=st.sampled_from(["recompute", "swap"]))
def test_plans_are_those_of_the_engine(seed, overlap, mode):
    """The engine, with an executor that is as fast as the simulated one and says the same tokens, makes the same plans:
    under preemption, with swaps, from shared prefixes."""
    here = spec(**SMALL | {"overlap": overlap, "preemption_mode": mode, "cost": cost(host_s=0.002, copy_s=0.001)})
    workload = traffic(seed)
    run = simulate(workload, [here])
    assert [record.num_output for record in run.records] == [each.output_tokens for each in workload.calls]
    assert plans_of(run) == _plans_of_engine(workload, here)


def _plans_of_engine(workload: Workload, here: ReplicaSpec) -> list[StepPlan]:
    clock = VirtualClock()
    capacity = simulate(work(call("x")), [here]).replicas[0].executor.capacity()
    executor = Watched(
        capacity, build_ladder(here.max_num_seqs, here.token_budget), here.cost, clock, overlap=here.overlap
    )
    store = KVStore(here.num_blocks, here.block_size)
    scheduler = Scheduler(
        [store],
        make_policy("fcfs"),
        capacity,
        token_budget=here.token_budget,
        swap_rule=swap_rule(here.preemption_mode, here.cost),
    )
    engine = Engine(
        scheduler,
        executor,
        None,
        clock=clock,
        vocab_size=1 << 62,
        max_model_len=here.max_model_len,
        overlap=here.overlap,
    )
    waiting = list(workload.calls)
    while waiting or engine.has_work:
        if not engine.has_work and waiting:
            clock.advance(max(waiting[0].arrival_s - clock.now_s(), 0.0))
        while waiting and waiting[0].arrival_s <= clock.now_s():
            each = waiting.pop(0)
            number = len(workload.calls) - len(waiting)
            prompt = tuple(itertools.chain(*((piece.token,) * piece.length for piece in each.prompt)))
            executor.answers[f"{each.call_id}/0#{number}"] = Answer(RowResult(token_id=-number), each.output_tokens)
            engine.add(
                Request(
                    request_id=each.call_id,
                    prompt_token_ids=prompt,
                    params=SamplingParams(temperature=0.0, max_tokens=None, seed=0),
                    eos_token_ids=(END,),
                    client=each.client,
                    arrival_s=each.arrival_s,
                )
            )
        engine.step()
        scheduler.check()
    return [_unseeded(plan) for plan in executor.plans]


def _unseeded(plan: StepPlan) -> StepPlan:
    """The simulator's requests have no seed."""
    rows = [
        row._replace(seat=dataclasses.replace(row.seat, params=dataclasses.replace(row.seat.params, seed=None)))
        for row in plan.rows
    ]
    return dataclasses.replace(plan, rows=tuple(rows))


@pytest.mark.parametrize(
    ("mode", "link", "swaps"),
    [("recompute", 1e4, False), ("swap", 1e2, True), ("auto", 1e2, False), ("auto", 1e4, True)],
)
def test_blocks_that_move_keep_the_laws(mode, link, swaps):
    """A pool that holds a fraction of what wants to run. Over a slow link it is quicker to compute again."""
    run = simulate(traffic(7, 40), [spec(**SMALL | {"preemption_mode": mode, "cost": cost(swap_bytes_per_s=link)})])
    (replica,) = run.replicas
    counters = replica.scheduler.counters
    assert counters.preemptions > 5
    assert bool(counters.swapped) == bool(replica.executor.steps.swapped_bytes) == swaps
    replica.scheduler.check()
    assert replica.store.num_held == 0


@settings(max_examples=4)
@given(seed=st.integers(0, 10**6), host_s=st.sampled_from([0.0, 0.001, 0.05]), overlap=st.booleans())
def test_time_is_conserved(seed, host_s, overlap):
    """Steps do not overlap; the device's work and its idleness make the whole; calls go through their times in order."""
    run = simulate(traffic(seed), [spec(cost=cost(host_s=host_s), overlap=overlap)])
    steps = run.replicas[0].executor.steps
    idle_s, last_s = 0.0, 0.0
    for start_s, end_s in zip(steps.start_s, steps.end_s, strict=True):
        assert last_s <= start_s + 1e-12 and start_s <= end_s
        idle_s, last_s = idle_s + start_s - last_s, end_s
    assert steps.busy_s + idle_s == pytest.approx(run.end_s)
    for record in run.records:
        assert record.arrival_s <= record.start_s <= record.first_s <= record.last_s == record.finish_s <= run.end_s


def test_one_call_by_hand():
    """48 prompt tokens, then 3 steps of one: 64 ms (padded) and 3 ms. A step that is planned ahead is wasted at the end."""
    run = simulate(work(call("a", 48, 4, arrival_s=1.0)), [spec()])
    (record,) = run.records
    assert (record.first_s, record.finish_s) == (pytest.approx(1.064), pytest.approx(1.067))
    assert list(run.gaps.seconds) == pytest.approx([0.001] * 3)
    assert run.replicas[0].scheduler.counters.wasted_rows == 1
    known = simulate(work(call("a", 48, 4, arrival_s=1.0)), [spec()], knows_lengths=True)
    assert known.records[0].finish_s == record.finish_s
    assert known.replicas[0].scheduler.counters.wasted_rows == 0, "who knows the length plans no step too many"


def test_steps_shorter_than_a_poll_follow_each_other():
    """With a host that takes no time nothing passes between the first step and the plan of the second."""
    quick = dataclasses.replace(SLOW.device, flop_per_s=1e6)
    (record,) = simulate(work(call("a", 16, 5)), [spec(cost=cost(device=quick))]).records
    assert record.finish_s == pytest.approx((16 + 4) * 1e-6)


def test_the_limit_that_the_scheduler_knows_ends_an_answer():
    run = simulate(work(call("a", 16, 9, max_tokens=5), call("b", 250, 9)), [spec()])
    assert [(record.num_output, str(record.finish)) for record in run.records] == [(5, "length"), (6, "length")]


def test_what_a_spec_says_is_done():
    calls = work(*(call(str(n), 50, 6, client=f"c{n % 2}") for n in range(6)))
    quota = simulate(calls, [spec(client_quota=1)]).records
    for first, second in itertools.pairwise(record for record in quota if record.call.client == "c0"):
        assert first.finish_s <= second.start_s
    rows = [row for plan in plans_of(simulate(calls, [spec(chunked=False)])) for row in plan.rows if row.start < 50]
    assert [row.num_tokens for row in rows] == [50] * 6
    cut = [row for plan in plans_of(simulate(calls, [spec()])) for row in plan.rows if row.start < 50]
    assert len(cut) > 6


def test_children_wait_for_their_parents_and_for_what_takes_time_between():
    a, b = call("a", 16, 3, program="p"), call("b", 16, 9, program="p")
    c = call("c", (Said("a"), Said("b")), 1, parents=("a", "b"), think_s=2.0, program="p")
    d = call("d", (After("c"), Span(5, 8)), 2, parents=("c",), arrival_s=50.0, program="p")
    first, second, third, fourth = simulate(work(a, b, c, d), [spec()]).records
    assert third.arrival_s == max(first.finish_s, second.finish_s) + 2.0
    assert third.num_prompt == 3 + 9
    assert (fourth.num_prompt, fourth.arrival_s) == (12 + 1 + 8, 50.0)


def test_a_next_turn_finds_the_one_before_in_the_cache():
    turns = [call("0", 40, 24)] + [
        call(str(n), (After(str(n - 1)), Span(1000 + n, 8)), 24, parents=(str(n - 1),)) for n in (1, 2, 3)
    ]
    run = simulate(work(*turns), [spec()])
    sizes = [record.num_prompt for record in run.records]
    assert sizes == [40, 72, 104, 136]
    assert [record.num_cached for record in run.records] == [0, 56, 88, 120], "whole blocks whose last token was fed"
    assert not any(record.num_cached for record in simulate(work(*turns), [spec(caching=False)]).records)


def test_siblings_do_not_share_answers():
    """Two answers to one prompt are different texts, so what follows them shares the prompt only."""
    parts = [call(f"s{n}", (Span(3, 32),), 16) for n in (0, 1)]
    parts += [call(f"c{n}", (After("s0"), Span(50 + n, 8)), 2, parents=("s0", "s1")) for n in (0, 1)]
    parts.append(call("x", (After("s1"), Span(60, 8)), 2, parents=("c0", "c1")))
    run = simulate(work(*parts), [spec()])
    assert [record.num_cached for record in run.records][2:] == [40, 40, 40]
    assert run.records[4].num_prompt == 32 + 16 + 8


def test_what_never_fits_is_refused_and_its_children_do_not_come():
    """Without its tokens being made: these would take 8 TB."""
    calls = [call("a", 10**12, 2, program="p"), call("b", 16, 2, parents=("a",), program="p"), call("c", 16, 2)]
    run = simulate(work(*calls), [spec()])
    assert [(record.call.call_id, record.refused) for record in run.records] == [
        ("a", "a prompt of 1000000000000 tokens, and max_model_len is 256"),
        ("c", ""),
    ]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_same_simulation_twice_is_the_same(policy):
    digests = set()
    for _ in range(2):
        run = simulate(traffic(3), [spec(**SMALL), spec(**SMALL)], policy)
        digests.add(tuple(replica.executor.steps.digest.hexdigest() for replica in run.replicas))
    assert len(digests) == 1
    other = simulate(traffic(4), [spec(**SMALL), spec(**SMALL)], policy)
    assert tuple(replica.executor.steps.digest.hexdigest() for replica in other.replicas) not in digests


class RoundRobin:
    """Also writes down what it is told."""

    def __init__(self):
        self.seen, self.finished, self.ended = [], [], []

    def route(self, request, snapshots, now_s):
        self.seen.append((now_s, snapshots))
        return len(self.seen) % len(snapshots)

    def finish(self, request_id, num_output):
        self.finished.append((request_id, num_output))

    def end_program(self, program):
        self.ended.append(program)


def test_replicas_share_the_work_and_say_how_they_are():
    router = RoundRobin()
    short = {"fan_out": 6, "chunk": 40, "instruction": 8, "summary": ["even", 3, 9], "result": 9}
    workload = generate("map-reduce", count=4, rate=5.0, options=short)
    run = simulate(workload, [spec()] * 3, router=lambda: router)
    assert {record.replica for record in run.records} == {0, 1, 2}
    assert sorted(router.finished) == sorted((r.call.call_id, r.num_output) for r in run.records)
    assert sorted(router.ended) == ["job0", "job1", "job2", "job3"]
    for now_s, snapshots in router.seen:
        for snapshot in snapshots:
            assert snapshot.time_s == now_s
            assert 0 <= snapshot.num_free <= snapshot.num_blocks
            assert snapshot.work_s >= 0 and (snapshot.num_sequences or not snapshot.work_s)
            assert snapshot.work_s > 0 or not snapshot.num_waiting
    (last,) = (snapshots for _, snapshots in router.seen[-1:])
    assert sum(snapshot.num_accepted for snapshot in last) == len(run.records) - 1
    assert last[1].cached((workload.calls[0].prompt[0].token,) * 9, "") == 8, "the instruction is cached by now"
    idle = [replica.snapshot(run.end_s) for replica in run.replicas]
    assert all(snapshot.work_s == 0 and snapshot.num_free == 64 for snapshot in idle)


def test_the_least_loaded_replica_takes_a_call():
    run = simulate(work(*(call(str(n), 16, 20) for n in range(6))), [spec()] * 3)
    assert [record.replica for record in run.records] == [0, 1, 2, 0, 1, 2]
    later = work(call("a", 16, 400, arrival_s=0.0), call("b", arrival_s=0.1), call("c", arrival_s=0.2))
    assert [record.replica for record in simulate(later, [spec()] * 2).records] == [0, 1, 1]


def test_routers_look_at_snapshots_no_older_than_they_are_told():
    router = RoundRobin()
    times = [0.0, 0.2, 0.45, 0.5, 0.7, 1.2]
    calls = [call(str(n), 16, 20, arrival_s=time_s) for n, time_s in enumerate(times)]
    simulate(work(*calls), [spec()] * 2, router=lambda: router, snapshot_s=0.5)
    assert [snapshots[0].time_s for _, snapshots in router.seen] == [0.0, 0.0, 0.0, 0.5, 0.5, 1.2]


def test_work_that_is_left_falls_as_it_is_done_and_is_guessed_from_calls_of_the_same_stage():
    replica, free = Replica(0, spec(), Fcfs()), SamplingParams(max_tokens=None)
    work_s = []
    for name, stage, length in (("first", "a", 40), ("second", "b", 3), ("third", "a", 40)):
        request = Request(request_id=name, prompt_token_ids=(1,) * 20, eos_token_ids=(0,), stage=stage, params=free)
        replica.add(request, RowResult(token_id=-1), length)
        found = [replica.snapshot(0.0).work_s]
        while replica.has_work:
            for item in replica.advance():
                if item.finish:
                    replica.forget(item.sequence)
            found.append(replica.snapshot(0.0).work_s)
        assert found == sorted(found, reverse=True)
        assert found[-1] == 0.0
        work_s.append(found)
    unknown, other, known = (found[0] for found in work_s)
    assert unknown == other  # nothing has ended of either stage
    assert known == pytest.approx(replica.spec.cost.service_s(20, 40))
    assert len(set(work_s[2])) > 40  # a little less with each token


@pytest.mark.parametrize("is_signal", [True, False])
def test_an_interrupted_simulation_keeps_what_it_has(is_signal):
    """By Ctrl-C, or by who watches."""
    ended = []

    def watch(count, now_s):
        ended.append((count, now_s))
        if len(ended) == 3:
            if not is_signal:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    run = simulate(traffic(1), [spec()], watch=watch)
    assert run.is_partial
    assert sum(record.finish_s is not None for record in run.records) == sum(count for count, _ in ended)
    assert (len(ended), run.end_s) == (3, ended[-1][1])
    assert signal.getsignal(signal.SIGINT) is before


class Never(Policy):
    """Admits nobody."""

    def order(self, waiting, running, now_s):
        return iter(())


def test_a_policy_that_admits_nobody_is_found_out(monkeypatch):
    monkeypatch.setattr("jaxserve.sim.run._MOST_POLLS", 50)
    with pytest.raises(AssertionError, match="the policy admits none of them"):
        simulate(work(call("a")), [spec()], Never)


def test_metadata_reach_the_scheduler():
    seen = []

    class Curious(Policy):
        def on_arrival(self, view, now_s):
            seen.append(view.request)

    fields = {"client": "c", "program": "p", "stage": "s", "priority": -2, "deadline_s": 9.0, "namespace": "n"}
    simulate(work(call("a", **fields), call("b", parents=("a",))), [spec()], Curious)
    assert {name: getattr(seen[0], name) for name in fields} == fields
    assert seen[1].parents == ("a",)
    assert seen[0].params.max_tokens is None, "how long an answer will be is nobody's business"
