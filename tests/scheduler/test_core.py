"""Laws of the scheduler, read off the plans of random traffic."""

import itertools
import random
from collections import defaultdict

import pytest

from jaxserve.request import Task
from tests.fakes import VOCAB_SIZE, Rig, ask, check_answer, make_engine
from tests.test_soak import random_request


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(1, VOCAB_SIZE) for _ in range(length)]


def drive(rig: Rig, requests, seed: int = 0, observe=lambda plan, before: None) -> dict:
    """Feed requests at random times. `observe` sees each plan, and what each running sequence had left before it."""
    rng, todo, outputs = random.Random(seed), list(reversed(requests)), {}
    for _ in range(20_000):
        while todo and rng.random() < 0.5:
            rig.engine.add(todo.pop())
        running = rig.scheduler._running
        before = {s.seq_id: (s.num_left, s.is_prefill, s.num_pending, s.needs_host) for s in running}
        num_plans, num_preempted = len(rig.executor.plans), rig.scheduler.counters.preemptions
        outputs |= {event.request_id: event.output for event in rig.step()}
        if len(rig.executor.plans) > num_plans and rig.scheduler.counters.preemptions == num_preempted:
            observe(rig.executor.plans[-1], before)
        if not todo and not rig.engine.has_work:
            break
    rig.check_empty()
    assert set(outputs) == {r.request_id for r in requests}
    return outputs


def traffic(seed: int, count: int = 60):
    rng = random.Random(seed)
    prefixes = [prompt_of(rng, 30) for _ in range(3)]
    return [random_request(rng, f"r{i}", prefixes) for i in range(count)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [3, 8, 40])
def test_only_decodes_may_exceed_the_token_budget(seed, budget):
    rig = make_engine(budget=budget, num_slots=6, num_blocks=40)

    def observe(plan, before):
        if plan.num_tokens > budget:
            assert all(row.num_tokens == 1 and row.seq_id in before for row in plan.rows)
            assert not any(before[row.seq_id][1] for row in plan.rows)

    drive(rig, traffic(seed), seed, observe)


@pytest.mark.parametrize("seed", range(4))
def test_every_running_decode_is_in_every_step(seed):
    rig = make_engine(num_blocks=300, budget=8)

    def observe(plan, before):
        due = {
            seq_id
            for seq_id, (left, is_prefill, pending, needs_host) in before.items()
            if left and not is_prefill and not (needs_host and pending)
        }
        assert due <= {row.seq_id for row in plan.rows}

    drive(rig, traffic(seed), seed, observe)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_blocks", [17, 200])
def test_rows_of_a_sequence_are_contiguous_and_cover_what_was_not_cached(seed, num_blocks):
    rig = make_engine(num_blocks=num_blocks, budget=10)
    requests = {r.request_id: r for r in traffic(seed)}
    drive(rig, list(requests.values()), seed)
    spans = defaultdict(list)
    for plan in rig.executor.plans:
        for row in plan.rows:
            spans[row.seq_id, row.seat.epoch].append(row)
    for rows in spans.values():
        for first, second in itertools.pairwise(rows):
            assert second.start == first.start + first.num_tokens
            assert second.slot == first.slot
            assert not (first.samples and second.num_tokens > 1)
    for (seq_id, _), rows in spans.items():
        prompt = requests[seq_id.split("/")[0]].prompt_token_ids
        assert rows[0].start < len(prompt) or rows[0].seat.epoch, "at least the last prompt token is computed"
        for row in rows:
            if row.start < len(prompt):
                part = prompt[row.start :][: len(row.token_ids)]
                assert row.token_ids[: len(part)] == part


def test_cached_and_computed_prompt_tokens_add_up():
    rig = make_engine(num_blocks=200, budget=7)
    rng = random.Random(1)
    prefix = prompt_of(rng, 20)
    requests = [ask(f"r{i}", prefix + prompt_of(rng, 5), max_tokens=1) for i in range(10)]
    for request in requests:
        rig.run(request)
    counters = rig.scheduler.counters
    assert counters.prompt_tokens + counters.cached_tokens == 250
    assert counters.cached_tokens == 9 * 20
    assert counters.output_tokens == 10


@pytest.mark.parametrize("overlap", [True, False])
def test_a_pool_for_one_serves_many(overlap):
    """Preemption, not failure: each of these fits alone, no two of them do."""
    rig = make_engine(num_blocks=8, max_model_len=32, overlap=overlap)
    rng = random.Random(2)
    requests = [ask(f"r{i}", prompt_of(rng, 10), max_tokens=22, min_tokens=22) for i in range(6)]
    outputs = rig.run(*requests)
    for request in requests:
        check_answer(outputs[request.request_id], request, max_model_len=32)
    assert rig.scheduler.counters.preemptions > 0
    assert sum(o.metrics.num_preemptions for o in outputs.values()) == rig.scheduler.counters.preemptions


def test_the_oldest_request_is_never_preempted_under_fcfs():
    rig = make_engine(num_blocks=12, max_model_len=40)
    rng = random.Random(3)
    requests = [ask(f"r{i}", prompt_of(rng, 8), max_tokens=32, min_tokens=32) for i in range(5)]
    outputs = rig.run(*requests)
    assert rig.scheduler.counters.preemptions > 0
    assert outputs["r0"].metrics.num_preemptions == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_priority_goes_first_and_equals_keep_their_order(overlap):
    rig = make_engine(num_slots=1, policy="priority", overlap=overlap)
    order = [3, 1, 2, 1, 0, 3]
    requests = [ask(f"r{i}", [1 + i], max_tokens=2, min_tokens=2, priority=p) for i, p in enumerate(order)]
    rig.run(*requests)
    started = [row.seq_id.split("/")[0] for plan in rig.executor.plans for row in plan.rows if row.start == 0]
    assert started == ["r4", "r1", "r3", "r2", "r0", "r5"]


def test_the_least_urgent_and_latest_is_preempted():
    rig = make_engine(num_blocks=12, max_model_len=40, policy="priority")
    rng = random.Random(4)
    requests = [ask(f"r{i}", prompt_of(rng, 8), max_tokens=32, min_tokens=32) for i in range(3)]
    outputs = rig.run(*requests)
    preempted = [outputs[f"r{i}"].metrics.num_preemptions for i in range(3)]
    assert preempted[0] == 0
    assert preempted[2] > 0


def test_without_chunking_a_prompt_is_one_row():
    rig = make_engine(chunked=False, budget=64, num_blocks=200)
    requests = traffic(5)
    drive(rig, requests)
    for plan in rig.executor.plans:
        for row in plan.rows:
            assert row.num_tokens == 1 or row.samples or row.task is Task.SCORE


def test_chunks_are_trimmed_to_a_compiled_size_where_that_is_cheaper():
    rig = make_engine(budget=256, rungs=(16, 64, 256), num_blocks=300, max_model_len=256)
    rig.run(ask("r", [1] * 70, max_tokens=1))
    assert [plan.num_tokens for plan in rig.executor.plans] == [64, 6]
    rig = make_engine(budget=256, rungs=(16, 64, 256), num_blocks=300, max_model_len=256)
    rig.run(ask("r", [1] * 200, max_tokens=1))
    assert [plan.num_tokens for plan in rig.executor.plans] == [200]


@pytest.mark.parametrize("overlap", [True, False])
def test_answers_of_one_request_share_the_blocks_of_its_prompt(overlap):
    rig = make_engine(num_blocks=64, overlap=overlap)
    rig.engine.add(ask("r", [1, 2, 3] * 8, n=4, temperature=1.0, seed=1, max_tokens=12, min_tokens=12))
    most = 0
    while rig.engine.has_work:
        rig.step()
        most = max(most, rig.store.num_held)
    # 24 tokens fill six blocks of 4. Each answer has its own three blocks for the 11 tokens that are fed again.
    assert most == 6 + 4 * 3
    computed = sum(plan.num_tokens for plan in rig.executor.plans)
    assert computed <= 24 + 3 + 4 * 11, "the prompt is computed once"


@pytest.mark.parametrize("task", [Task.SCORE, Task.EMBED])
def test_prompt_only_tasks_end_with_their_prompt(task):
    rig = make_engine(budget=5)
    request = ask("r", list(range(1, 19)), task=task, logprobs_from=3 if task is Task.SCORE else None)
    output = rig.run(request)["r"]
    assert output.outputs[0].token_ids == []
    assert output.outputs[0].finish_reason == "stop"
    assert rig.scheduler.counters.output_tokens == 0
    assert sum(plan.num_tokens for plan in rig.executor.plans) == 18
    if task is Task.EMBED:
        assert list(output.hidden) == list(range(1, 19))
    else:
        assert [table is None for table in output.prompt_logprobs] == [True] * 3 + [False] * 15


def test_a_prompt_of_the_longest_length_can_be_scored():
    rig = make_engine(num_blocks=16, max_model_len=64)
    output = rig.run(ask("r", [1] * 64, task=Task.SCORE, logprobs_from=1))["r"]
    assert all(output.prompt_logprobs[1:])


def test_waiting_for_room_is_no_use_of_a_cached_prefix():
    rig = make_engine(num_blocks=9, max_model_len=36)
    prefix = list(range(1, 9))
    rig.run(ask("before", [*prefix, 9], max_tokens=1))
    (uses,) = {node.num_uses for node in rig.store._tree.nodes()}
    rig.engine.add(ask("runs", [10] * 16, max_tokens=12, min_tokens=12))
    rig.step()
    rig.engine.add(ask("waits", [*prefix, *[11] * 12], max_tokens=1))
    steps_waited = 0
    while rig.scheduler.num_waiting:
        assert [node.num_uses for node in rig.store._tree.match("", prefix, 8)] == [uses, uses]
        steps_waited += 1
        rig.step()
    assert steps_waited > 5
    assert [node.num_uses for node in rig.store._tree.match("", prefix, 8)] == [uses + 1, uses + 1]
    rig.run()


@pytest.mark.parametrize(
    "options", [{}, {"num_blocks": 17}, {"policy": "priority", "num_blocks": 17}, {"num_blocks": 17, "num_replicas": 3}]
)
def test_the_same_inputs_give_the_same_plans(options):
    plans = []
    for _ in range(2):
        rig = make_engine(**options)
        drive(rig, traffic(7), 7)
        plans.append(rig.executor.plans)
    assert plans[0] == plans[1]


@pytest.mark.parametrize("num_blocks", [17, 100])
def test_answers_do_not_depend_on_overlap_chunking_caching_budget_or_replicas(num_blocks):
    answers = []
    for options in (
        {},
        {"overlap": False},
        {"chunked": False, "budget": 64},
        {"caching": False},
        {"budget": 3},
        {"num_slots": 1},
        {"block_size": 8, "num_blocks": num_blocks // 2},
        {"num_replicas": 2},
        {"num_replicas": 4, "num_slots": 2, "chunked": False, "budget": 64},
    ):
        rig = make_engine(**{"num_blocks": num_blocks} | options)
        outputs = drive(rig, traffic(8))
        answers.append({i: [(a.token_ids, a.text, a.logprobs) for a in o.outputs] for i, o in outputs.items()})
    assert all(answer == answers[0] for answer in answers)


def test_requests_without_a_seed_differ_and_repeat_with_the_engine():
    runs = []
    for _ in range(2):
        rig = make_engine()
        requests = [ask(f"r{i}", [1, 2], temperature=1.0, max_tokens=8, min_tokens=8) for i in range(4)]
        runs.append([o.outputs[0].token_ids for _, o in sorted(rig.run(*requests).items())])
    assert runs[0] == runs[1]
    assert len({tuple(r) for r in runs[0]}) == 4
