"""Several replicas behind one queue: laws of every plan in random walks, and who goes where."""

import itertools
import random
from collections import Counter, defaultdict

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from jaxserve.scheduler.core import Scheduler
from jaxserve.scheduler.sequence import Sequence, State
from jaxserve.step import StepPlan
from tests.fakes import VOCAB_SIZE, Rig, ask, check_answer, make_engine

MAX_MODEL_LEN = 32
PREFIXES = [tuple(random.Random(i).randrange(1, VOCAB_SIZE) for _ in range(16)) for i in range(2)]


class Laws:
    """Looks at every plan at the moment it is made."""

    def __init__(self, rig: Rig, budget: int):
        self.rig, self.budget = rig, budget
        self.homes: dict[tuple[str, int], int] = {}  # (sequence, epoch) -> its replica
        self.tokens = Counter()
        self._plan = rig.scheduler.plan
        rig.scheduler.plan = self.plan

    def plan(self, now_s: float) -> StepPlan | None:
        scheduler = self.rig.scheduler
        waiting = [scheduler._sequences[view.seq_id] for view in scheduler.waiting]
        could_start = [sequence for sequence in waiting if may_start(scheduler, sequence)]
        ran = {s.seq_id: (s.replica, s.epoch) for s in scheduler._running}
        plan = self._plan(now_s)
        scheduler.check()
        sequences = scheduler._sequences
        short = {home for name, (home, epoch) in ran.items() if sequences[name].epoch != epoch}
        for s in scheduler._running:
            assert s.replica not in short or ran.get(s.seq_id) == (s.replica, s.epoch), (
                "admitted where one was thrown out"
            )
        if any(not replica.running for replica in scheduler._replicas):
            still = [s.seq_id for s in could_start if s.view in scheduler.waiting and may_start(scheduler, s)]
            assert not still, "a replica is idle while others queue"
        if plan is not None:
            self.check(plan)
        return plan

    def check(self, plan: StepPlan) -> None:
        capacity = self.rig.executor.capacity()
        parts = defaultdict(list)
        for row in plan.rows:
            parts[row.replica].append(row)
            assert self.homes.setdefault((row.seq_id, row.seat.epoch), row.replica) == row.replica
        assert set(parts) <= set(range(capacity.num_replicas))
        for replica, rows in parts.items():
            count = sum(row.num_tokens for row in rows)
            assert count <= self.budget or all(row.num_tokens == 1 for row in rows), "only decodes exceed a budget"
            assert len(rows) <= capacity.num_slots
            assert all(0 <= block < capacity.num_blocks for row in rows for block in row.blocks)
            self.tokens[replica] += count
        loads = [(sum(row.num_tokens for row in rows), len(rows)) for rows in parts.values()]
        assert sorted((load.num_tokens, load.num_rows) for load in plan.loads) == sorted(loads)
        assert all(load.num_rows == 1 for load in plan.loads if load.is_prompt)
        assert self.rig.scheduler.counters.replica_tokens == [self.tokens[r] for r in range(capacity.num_replicas)]


def may_start(scheduler: Scheduler, sequence: Sequence) -> bool:
    """Whether a waiting sequence could run on an idle replica now."""
    if sequence.num_pending or not sequence.wants_more:
        return False
    parent = sequence.parent
    if parent is None or sequence.num_output or parent.state is State.FINISHED:
        return True
    # It waits for its prompt, or for the replica that has it; when that is full it may go elsewhere.
    home = scheduler._replicas[parent.replica]
    return parent.state is State.RUNNING and parent.num_computed >= parent.num_prompt and not home.has_slot


class ReplicaWalk(RuleBasedStateMachine):
    """Requests come, end and are aborted in any order; in the end every answer is what it was alone."""

    def __init__(self, num_replicas: int):
        super().__init__()
        self.num_replicas = num_replicas

    @initialize(
        num_blocks=st.integers(8, 16),
        num_slots=st.integers(1, 5),
        budget=st.integers(2, 24),
        policy=st.sampled_from(("fcfs", "priority")),
        caching=st.booleans(),
        overlap=st.booleans(),
    )
    def start(self, budget, **options):
        options |= {"max_model_len": MAX_MODEL_LEN, "rungs": (4, 16, 64), "num_replicas": self.num_replicas}
        self.rig = make_engine(budget=budget, **options)
        self.laws = Laws(self.rig, budget)
        self.requests, self.outputs, self.aborted = {}, {}, set()

    @rule(
        prefix=st.sampled_from(PREFIXES),
        prompts=st.lists(
            st.tuples(st.integers(0, 16), st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=1, max_size=4)),
            min_size=1,
            max_size=5,
        ),
        n=st.sampled_from((1, 1, 1, 2, 5)),
        max_tokens=st.integers(1, 20),
        priority=st.integers(-1, 1),
        edits=st.booleans(),
    )
    def add(self, prefix, prompts, n, max_tokens, priority, edits):
        for shared, rest in prompts:
            name = f"r{len(self.requests)}"
            request = self.requests[name] = ask(
                name,
                [*prefix[:shared], *rest],
                n=n,
                temperature=0.7,
                seed=len(self.requests),
                max_tokens=max_tokens,
                min_tokens=max_tokens,
                priority=priority,
                frequency_penalty=0.5 * edits,
            )
            self.rig.engine.add(request)

    @precondition(lambda self: self.requests)
    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.take(self.rig.step())

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.requests)))
        if not (name in self.outputs and self.outputs[name].finished):
            self.aborted.add(name)
        self.take(self.rig.engine.abort(name))
        self.rig.scheduler.check()

    def take(self, events):
        self.outputs |= {event.request_id: event.output for event in events}

    def teardown(self):
        if not hasattr(self, "rig"):
            return
        self.outputs |= self.rig.run()
        for name, request in self.requests.items():
            assert self.outputs[name].finished
            if name not in self.aborted:
                check_answer(self.outputs[name], request, max_model_len=MAX_MODEL_LEN)


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_laws_hold_in_random_walks(num_replicas):
    walks = settings(max_examples=30, stateful_step_count=20, deadline=None)
    run_state_machine_as_test(lambda: ReplicaWalk(num_replicas), settings=walks)


def replicas_of(rig: Rig, request_id: str) -> list[int]:
    """Where the rows of a request ran."""
    rows = [row for plan in rig.executor.plans for row in plan.rows]
    return sorted({row.replica for row in rows if row.seq_id.startswith(f"{request_id}/")})


def test_a_prompt_goes_where_its_beginning_is_cached():
    rig = make_engine(num_replicas=4)
    prompts = [[i] * 12 for i in range(1, 5)]
    rig.run(*(ask(f"first{i}", prompt, max_tokens=1) for i, prompt in enumerate(prompts)))
    homes = [replicas_of(rig, f"first{i}") for i in range(4)]
    assert sorted(homes) == [[0], [1], [2], [3]], "nothing cached: one each"
    for i, prompt in reversed(list(enumerate(prompts))):
        output = rig.run(ask(f"again{i}", [*prompt, 9], max_tokens=1))[f"again{i}"]
        assert replicas_of(rig, f"again{i}") == homes[i]
        assert output.metrics.num_cached_tokens == 12


def test_a_prefix_that_all_share_spreads_when_its_replica_is_clearly_fuller():
    rig = make_engine(num_replicas=2, num_slots=8, num_blocks=200)
    prefix = list(range(1, 17))
    rig.run(ask("before", prefix, max_tokens=1))
    for i in range(8):
        rig.engine.add(ask(f"r{i}", [*prefix, i + 1], max_tokens=40, min_tokens=40))
        rig.step()
    # Up to two more of eight slots are no reason to compute the prefix again. The fourth goes to the other replica, and
    # when it is cached there, too, the emptier one is taken.
    assert [replicas_of(rig, f"r{i}") for i in range(8)] == [[0], [0], [0], [1], [0], [1], [1], [1]]
    computed = rig.scheduler.counters.prompt_tokens
    assert computed == 16 + 8 + 16, "the prefix is computed once on each replica"
    rig.run()


def test_equal_prompts_that_come_at_once_are_spread_evenly():
    rig = make_engine(num_replicas=4, num_slots=8, num_blocks=200, budget=64, max_model_len=64)
    for i in range(16):
        rig.engine.add(ask(f"r{i}", [i + 1] * 12, max_tokens=20, min_tokens=20))
    rig.step()
    assert [len(replica.running) for replica in rig.scheduler._replicas] == [4, 4, 4, 4]
    rig.run()
    tokens = rig.scheduler.counters.replica_tokens
    assert max(tokens) - min(tokens) <= 4


def test_nobody_queues_behind_a_long_prompt_to_run_beside_fewer_sequences():
    rig = make_engine(num_replicas=2, num_blocks=100)
    rig.run(ask("long", [1] * 20, max_tokens=1), *(ask(f"short{i}", [2 + i] * 4, max_tokens=1) for i in range(3)))
    assert replicas_of(rig, "long") == [0]
    assert [replicas_of(rig, f"short{i}") for i in range(3)] == [[1]] * 3


def test_where_the_prefix_is_but_no_room_nobody_waits_for_it():
    rig = make_engine(num_replicas=2, num_blocks=10, max_model_len=40)
    prefix = list(range(1, 9))
    rig.run(ask("before", prefix, max_tokens=1))
    rig.engine.add(ask("runs", [9] * 24, max_tokens=4, min_tokens=4))
    rig.step()
    rig.step()
    rig.run(ask("new", [*prefix, *[10] * 8], max_tokens=2))
    assert replicas_of(rig, "before") == replicas_of(rig, "runs") == [0]
    assert replicas_of(rig, "new") == [1]
    assert rig.scheduler.counters.cached_tokens == 0


def test_answers_of_one_request_share_its_prompt_on_one_replica():
    rig = make_engine(num_replicas=2)
    rig.engine.add(ask("other", [5] * 3, max_tokens=20, min_tokens=20))
    request = ask("r", [1, 2, 3] * 6, n=4, temperature=1.0, seed=1, max_tokens=8, min_tokens=8)
    check_answer(rig.run(request)["r"], request)
    (home,) = replicas_of(rig, "r")
    assert replicas_of(rig, "other") != [home]
    copies = [copy for plan in rig.executor.plans for copy in plan.copies]
    assert len(copies) == 3
    assert {copy.replica for copy in copies} == {home}
    rows = [row for plan in rig.executor.plans for row in plan.rows if row.seq_id.startswith("r/")]
    assert sum(row.num_tokens for row in rows) == 18 + 3 + 4 * 7, "the prompt is computed once"


def test_answers_that_find_no_slot_beside_the_first_go_elsewhere_and_compute_the_prompt_once_there():
    rig = make_engine(num_replicas=2, num_slots=4, num_blocks=100)
    request = ask("r", [1, 2, 3, 4] * 5, n=8, temperature=1.0, seed=1, max_tokens=12, min_tokens=12)
    check_answer(rig.run(request)["r"], request)
    assert replicas_of(rig, "r") == [0, 1]
    # Four share one computation of the prompt; of the other four the first computes it, and three find 16 of its tokens.
    assert rig.scheduler.counters.prompt_tokens == (20 + 3) + (20 + 3 * 4)


def test_who_is_preempted_may_go_on_elsewhere():
    rig = make_engine(num_replicas=2, num_blocks=12, num_slots=4, max_model_len=40)
    laws = Laws(rig, 32)
    rng = random.Random(3)
    prompts = [[rng.randrange(1, VOCAB_SIZE) for _ in range(8)] for _ in range(9)]
    lengths = itertools.cycle((32, 12, 20))
    requests = [
        ask(f"r{i}", prompt, max_tokens=length, min_tokens=length)
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=False))
    ]
    outputs = rig.run(*requests)
    for request in requests:
        check_answer(outputs[request.request_id], request, max_model_len=40)
    homes = defaultdict(set)
    for (seq_id, _), replica in laws.homes.items():
        homes[seq_id].add(replica)
    assert any(len(found) > 1 for found in homes.values())
    assert outputs["r0"].metrics.num_preemptions == 0, "the oldest never is, under first come, first served"


def test_waiting_for_blocks_on_one_replica_keeps_nobody_from_another():
    rig = make_engine(num_replicas=2, num_blocks=10, num_slots=4, max_model_len=40)
    rig.engine.add(ask("a", [1] * 8, max_tokens=30, min_tokens=30))
    rig.engine.add(ask("b", [2] * 8, max_tokens=4, min_tokens=4))
    rig.step()
    rig.engine.add(ask("large", [3] * 36, max_tokens=2, min_tokens=2))  # fits beside neither
    rig.engine.add(ask("small", [4] * 4, max_tokens=2, min_tokens=2))
    rig.step()
    assert rig.scheduler.num_waiting == 2, "nobody overtakes the large one where it could have gone"
    rig.run()
    assert replicas_of(rig, "large") == replicas_of(rig, "b")


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_more_replicas_take_fewer_steps(num_replicas):
    steps = []
    for count in (1, num_replicas):
        rig = make_engine(num_replicas=count, num_slots=2, num_blocks=40)
        requests = [ask(f"r{i}", [i % 5 + 1] * 6, max_tokens=20, min_tokens=20) for i in range(16)]
        outputs = rig.run(*requests)
        for request in requests:
            check_answer(outputs[request.request_id], request)
        steps.append(rig.scheduler.counters.steps)
    assert steps[1] < 1.2 * steps[0] / num_replicas


def test_there_is_a_store_for_each_replica():
    rig = make_engine(num_replicas=2)
    with pytest.raises(ValueError, match="1 stores for 2 replicas"):
        Scheduler(rig.stores[:1], None, rig.executor.capacity(), token_budget=8)  # pyright: ignore[reportArgumentType]
