"""What every policy in the folder has to obey, whatever its order: random traffic through the real scheduler and engine.

A policy is found by its file. So far as a law knows exceptions, they are named below.
"""

import collections
import dataclasses
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.config import SCHEDULING_POLICIES
from jaxserve.scheduler.placement import choices
from jaxserve.scheduler.policy import View
from tests.fakes import make_engine
from tests.test_soak import MAX_MODEL_LEN, check_request, random_request

# Policies that keep requests back although there is room, because it pays later.
HOLD_BACK = {"batchllm"}

CONFIGS = st.fixed_dictionaries(
    {
        "num_blocks": st.sampled_from((17, 24, 60)),  # 16 hold the longest sequence
        "num_slots": st.integers(2, 6),
        "budget": st.sampled_from((3, 10, 24)),
        "num_replicas": st.sampled_from((1, 1, 2)),
        "num_host_blocks": st.sampled_from((0, 16, 60)),
        "client_quota": st.sampled_from((None, None, 1, 2)),
        "overlap": st.booleans(),
        "caching": st.sampled_from((True, True, False)),
    }
)
# Options that bring out what the defaults rarely do in so short a time.
VARIANTS = {
    "lpm": [{}, {"window": 2, "patience_s": 0.1}],
    "vtc": [{}, {"strict": True}, {"weights": {"a": 5.0}, "patience_s": 0.1}],
    "dlpm": [{}, {"quantum": 9.0, "window": 3}, {"quantum": 0.01, "patience_s": 0.1}],
    "plas": [{}, {"first_bound": 3.0, "window": 1}],
    "atlas": [{}, {"first_bound": 3.0, "window": 1, "prefill_weight": 1.0}],
    "mlfq": [{}, {"first_bound": 3.0, "window": 1, "levels": 2}],
    "fastswitch": [{"trace": "random", "frequency": 0.5, "residency": 1}, {"keep_copies": False}],
    "hexgen": [{}, {"mode": "least_slack", "patience_s": 0.5}],
    "batchllm": [{}, {"future_share": 0.5}, {"max_pinned_share": 0.1}],
    "sarathi": [{}, {"tbt_s": 0.01}],
    "splitfuse": [{}, {"tokens": 4}],
}
STRANGE = "\n\x00" + "é" * 300  # clients name themselves


def random_requests(rng: random.Random, count: int) -> list[Any]:
    """Anything a caller may ask for, of four clients and three programs; parents are earlier requests of the program."""
    prefixes = [[rng.randrange(1, 20) for _ in range(30)] for _ in range(3)]
    requests, calls = [], collections.defaultdict(list)
    for index in range(count):
        request = random_request(rng, f"r{index}", prefixes)
        program = rng.choice(("", "p", "q", "s"))
        earlier = calls[program] if program else []
        pin_tokens = rng.randint(1, len(request.prompt_token_ids)) if rng.random() < 0.1 else 0
        requests.append(
            dataclasses.replace(
                request,
                client=rng.choice(("", "a", "b", STRANGE)),
                program=program,
                parents=tuple(rng.sample(earlier, min(len(earlier), rng.randint(0, 2)))),
                stage=rng.choice(("", "plan", "answer")),
                deadline_s=rng.choice((None, None, 0.05, 2.0)),
                pin=rng.choice(("x", "y")) if pin_tokens else "",
                pin_tokens=pin_tokens,
            )
        )
        calls[program].append(request.request_id)
    return requests


class Run:
    """Requests come in bursts, some are aborted; each step is compared with the laws."""

    def __init__(self, name: str, config: dict[str, Any], seed: int, count: int, *, failing: float = 0.0):
        self.rng, self.config, self.holds_back = random.Random(seed), config, name in HOLD_BACK
        self.rig = make_engine(policy=name, max_model_len=MAX_MODEL_LEN, **config)
        self.requests = random_requests(self.rng, count)
        self.outputs, self.cut_short, self.was_idle = {}, set(), False
        self.failing, self.step_s = failing, self.rng.choice((0.0, 0.1, 3.0))  # slow steps: patience ends
        self._watch_admissions()

    def _watch_admissions(self) -> None:
        scheduler = self.rig.scheduler
        admit, lets_pass, misfits = scheduler._admit, scheduler._policy.lets_pass, []

        def watched(drafts, now_s):
            misfits.clear()
            num_preempted = scheduler.counters.preemptions
            # Their prompt may come back from host memory right now, behind them in the order; they follow a step later.
            orphans = {view.seq_id for view in scheduler.waiting if scheduler._sequences[view.seq_id].awaits_parent}
            admit(drafts, now_s)
            if not self.holds_back and scheduler.counters.preemptions == num_preempted:  # else a quota has room again
                self._check_nobody_could_have_come(drafts, misfits, orphans)

        def noted(view, now_s):
            misfits.append(view.request.client)
            return lets_pass(view, now_s)

        scheduler._admit = watched
        scheduler._policy = _Noting(scheduler._policy, noted)

    def _check_nobody_could_have_come(self, drafts, misfits, orphans) -> None:
        """Work conservation: with tokens and a slot to spare, whoever still waits has to, or others of its client do."""
        scheduler, quota = self.rig.scheduler, self.config.get("client_quota")
        vacant = [r for d, r in zip(drafts, scheduler.replicas, strict=True) if d.may_admit and r.has_slot]
        for view in scheduler.waiting if vacant else ():
            sequence = scheduler._sequences[view.seq_id]
            if sequence.num_pending or not sequence.wants_more or sequence.awaits_parent or view.seq_id in orphans:
                continue
            if quota and scheduler.accounts.of(view.request.client).num_running >= quota:
                continue
            assert view.request.client in misfits or not choices(scheduler.replicas, vacant, sequence), (
                "somebody waits for nothing"
            )

    def play(self) -> None:
        rig, rng, todo, alive = self.rig, self.rng, list(reversed(self.requests)), []
        for _ in range(300 * len(self.requests)):
            for _ in range(min(rng.choice((0, 0, 0, 1, 4)), len(todo))):
                request = todo.pop()
                alive.append(request.request_id)
                rig.engine.add(request)
            if alive and rng.random() < 0.03:
                self._take(rig.engine.abort(victim := rng.choice(alive)), victim)
            if rng.random() < 0.05:
                rig.engine.end_program(rng.choice("pqs"))
            if alive and rng.random() < 0.05:
                rig.engine.set_priority(rng.choice(alive), rng.randint(-3, 3))
            if rng.random() < self.failing:
                rig.executor.fail_next = rng.choice(("dispatch", "collect"))
            self._step()
            if not todo and not rig.engine.has_work:
                return
        raise AssertionError("somebody starves, or nothing happens any more")

    def _step(self) -> None:
        rig = self.rig
        was_busy, num_plans = rig.engine.pipeline.is_busy, len(rig.executor.plans)
        has_work, fails = rig.engine.has_work, bool(rig.executor.fail_next)
        self._take(rig.step())
        rig.clock.advance(self.step_s)
        # Who displaced all others may itself have to wait for a step.
        is_idle = has_work and not (was_busy or fails or len(rig.executor.plans) > num_plans)
        assert not (is_idle and self.was_idle), "nothing runs, though somebody waits"
        self.was_idle = is_idle
        for plan in rig.executor.plans[num_plans:]:
            for load in plan.loads:
                is_within = load.num_tokens <= self.config["budget"] or load.num_tokens == load.num_rows
                assert is_within, f"{load.num_tokens} tokens for {load.num_rows} rows"
        if quota := self.config.get("client_quota"):
            running = collections.Counter(s.request.client for s in rig.scheduler._running)
            assert max(running.values(), default=0) <= quota
            for client, count in running.items():
                assert rig.scheduler.accounts.of(client).num_running == count

    def _take(self, events, aborted: str = "") -> None:
        for event in events:
            self.outputs[event.request_id] = event.output
            if aborted or event.finish_reason == "error":
                self.cut_short.add(event.request_id)

    def check(self) -> None:
        """Everything has ended: every answer is the one alone, and nothing is left."""
        scheduler = self.rig.scheduler
        for name in ("x", "y"):
            scheduler.unpin(name)
        self.rig.check_empty()
        assert set(self.outputs) == {r.request_id for r in self.requests}
        for request in self.requests:
            if request.request_id not in self.cut_short:
                check_request(self.outputs[request.request_id], request)
        for replica in scheduler.replicas:
            assert not replica.store.seq_ids
            assert replica.host is None or (not replica.host.store.seq_ids and replica.host.store.num_held == 0)
        self._check_accounts()
        for program in ("p", "q", "s"):
            self.rig.engine.end_program(program)
        scheduler._policy.tick(self.rig.clock.now_s() + 1e6)
        left = names_in(scheduler._policy, {f"{r.request_id}/" for r in self.requests})
        assert len(left) <= self.config["num_slots"], f"the policy still knows {sorted(left)}"

    def _check_accounts(self) -> None:
        scheduler, counters = self.rig.scheduler, self.rig.scheduler.counters
        accounts = list(scheduler.accounts.as_dict().values())
        sums = collections.Counter()
        for account in accounts:
            sums.update(account)
        assert sums["num_running"] == 0
        assert sums["sequences"] == sums["finished"] + sums["aborted"] == sum(r.params.n for r in self.requests)
        for name in ("prompt_tokens", "cached_tokens", "output_tokens", "preemptions"):
            assert sums[name] == getattr(counters, name), name
        assert set(scheduler.accounts.as_dict()) == {r.client for r in self.requests}


class _Noting:
    """A policy, with `lets_pass` replaced."""

    def __init__(self, policy, lets_pass):
        self._policy = policy
        self.lets_pass = lets_pass

    def __getattr__(self, name):
        return getattr(self._policy, name)


def names_in(thing: Any, prefixes: set[str], depth: int = 6) -> set[str]:
    """Sequences that an object of a policy still refers to, by view or by id."""
    if isinstance(thing, View):
        return {thing.seq_id}
    if isinstance(thing, str):
        return {thing} if thing[: thing.find("/") + 1] in prefixes else set()
    if not depth or isinstance(thing, (int, float, type(None), type)):
        return set()
    if isinstance(thing, dict):
        parts = [*thing, *thing.values()]
    elif isinstance(thing, (list, tuple, set, frozenset, collections.deque)):
        parts = list(thing)
    else:
        slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        parts = [getattr(thing, name, None) for name in slots] + list(getattr(thing, "__dict__", {}).values())
    return {name for part in parts for name in names_in(part, prefixes, depth - 1)}


def with_options(data, name: str, config: dict[str, Any]) -> dict[str, Any]:
    return config | {"options": data.draw(st.sampled_from(VARIANTS.get(name, [{}])))}


@pytest.mark.parametrize("name", SCHEDULING_POLICIES)
@settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow], report_multiple_bugs=False)
@given(data=st.data(), config=CONFIGS, seed=st.integers(0, 1 << 32))
def test_answers_end_are_right_and_leave_nothing_behind(name, data, config, seed):
    config = with_options(data, name, config)
    run = Run(name, config, seed, 24)
    run.play()
    run.check()
    again = Run(name, config, seed, 24)
    again.play()
    assert again.rig.executor.plans == run.rig.executor.plans, "the same trace, another schedule"


@pytest.mark.parametrize("name", SCHEDULING_POLICIES)
@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow], report_multiple_bugs=False)
@given(data=st.data(), config=CONFIGS, seed=st.integers(0, 1 << 32))
def test_failing_steps_end_some_and_disturb_nobody_else(name, data, config, seed):
    config = with_options(data, name, config)
    run = Run(name, config, seed, 16, failing=0.05)
    run.play()
    run.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULING_POLICIES)
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow], report_multiple_bugs=False)
@given(data=st.data(), config=CONFIGS, seed=st.integers(0, 1 << 32), failing=st.sampled_from((0.0, 0.05)))
def test_many_runs(name, data, config, seed, failing):
    config = with_options(data, name, config)
    run = Run(name, config, seed, 40, failing=failing)
    run.play()
    run.check()
