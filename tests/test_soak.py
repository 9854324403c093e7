"""Random traffic over a pool that is far too small: nothing leaks, everything ends, every answer is what it was alone."""

import random

import pytest

from jaxserve.request import Request, Task
from tests.fakes import VOCAB_SIZE, ask, check_answer, make_engine, score

MAX_MODEL_LEN = 64


def random_request(rng: random.Random, request_id: str, prefixes: list[list[int]]) -> Request:
    """Anything a caller may ask for, often beginning as other requests do."""
    prompt = rng.choice(prefixes)[: rng.randint(0, 30)] + [
        rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, 12))
    ]
    options = {
        "n": rng.choice((1, 1, 1, 2, 3)),
        "max_tokens": rng.choice((1, 2, 5, 12, 30, None)),
        "temperature": rng.choice((0.0, 0.7)),
        "seed": rng.randrange(1 << 40),
        "priority": rng.randint(-2, 2),
        "namespace": rng.choice(("", "", "other")),
        "ignore_eos": rng.random() < 0.6,
        "include_stop_str_in_output": rng.random() < 0.3,
        "stop": rng.choice((None, None, "ab", ["xy", "cab", "a. "], "qwe")),
        "stop_token_ids": rng.choice((None, None, [3], [5, 9])),
        "logprobs": rng.choice((None, None, 2)),
    }
    if rng.random() < 0.2:
        options["bad_word_ids"] = rng.choice((((4,),), ((1, 2), (6,)), ((3, 1, 2),)))
    if rng.random() < 0.2:
        options["prompt_logprobs"] = rng.randint(0, 3)
    if rng.random() < 0.2:
        options["frequency_penalty"] = 0.5
    if options["max_tokens"] is None or options["max_tokens"] > 5:
        options["min_tokens"] = rng.choice((0, 0, 4))
    if rng.random() < 0.1:
        options |= {"task": rng.choice((Task.SCORE, Task.EMBED)), "n": 1, "logprobs": None}
        options["logprobs_from"] = rng.randint(1, len(prompt)) if options["task"] is Task.SCORE else None
        options["prompt_logprobs"] = 1 if options["task"] is Task.SCORE else None
    return ask(request_id, prompt, **options)


def check_request(output, request: Request) -> None:
    """The answer, and the log-probabilities that came with it."""
    prompt, params = list(request.prompt_token_ids), request.params
    if request.task is Task.EMBED:
        assert list(output.hidden) == prompt
    if request.task is Task.GENERATE:
        check_answer(output, request, max_model_len=MAX_MODEL_LEN)
        for answer in output.outputs if params.logprobs is not None else ():
            context = [prompt + answer.token_ids[:i] for i in range(len(answer.token_ids))]
            expected = [score(c, t, 0).logprob for c, t in zip(context, answer.token_ids, strict=True)]
            assert [t[i].logprob for t, i in zip(answer.logprobs, answer.token_ids, strict=True)] == expected
            assert answer.cumulative_logprob == pytest.approx(sum(expected))
    if request.logprobs_from is not None:
        for position, table in enumerate(output.prompt_logprobs):
            if position < request.logprobs_from:
                assert table is None
            else:
                assert table[prompt[position]].logprob == score(prompt[:position], prompt[position], 0).logprob


def soak(num_requests: int, seed: int, *, failing: float = 0.0, **options) -> None:
    """Requests arrive in bursts, some are aborted at some time; a share `failing` of the steps fails on the device."""
    rng = random.Random(seed)
    rig = make_engine(max_model_len=MAX_MODEL_LEN, **options)
    prefixes = [[rng.randrange(1, VOCAB_SIZE) for _ in range(30)] for _ in range(4)]
    requests = [random_request(rng, f"r{i}", prefixes) for i in range(num_requests)]
    todo, alive = list(reversed(requests)), list[str]()
    outputs, texts, cut_short = {}, {}, set()

    def take(events) -> None:
        for event in events:
            outputs[event.request_id] = event.output
            key = event.request_id, event.index
            texts.setdefault(key, []).append(event.text)
            assert not event.output.finished or event.request_id in alive
            if event.finish_reason == "error":
                assert failing
                assert event.output.error
                cut_short.add(event.request_id)
            if event.output.finished and all(o.finish_reason for o in event.output.outputs):
                finished.add(event.request_id)

    finished = set[str]()
    for _ in range(400 * num_requests):
        for _ in range(rng.choice((0, 0, 0, 1, 4)) if todo else 0):
            if todo:
                request = todo.pop()
                alive.append(request.request_id)
                rig.engine.add(request)
        if alive and rng.random() < 0.02:
            victim = rng.choice(alive)
            if victim not in finished:
                cut_short.add(victim)
            take(rig.engine.abort(victim))
            rig.scheduler.check()
        if rng.random() < failing:
            rig.executor.fail_next = rng.choice(("dispatch", "collect"))
        take(rig.step())
        if not todo and not rig.engine.has_work:
            break
    rig.check_empty()
    assert finished == set(alive) == {r.request_id for r in requests}
    for request in requests:
        output = outputs[request.request_id]
        for answer in output.outputs:
            assert "".join(texts[request.request_id, answer.index]) == answer.text
        if request.request_id not in cut_short:
            check_request(output, request)
    assert len(cut_short) < num_requests / 2, "hardly an answer was looked at"
    if options["num_blocks"] <= 20:
        assert rig.scheduler.counters.preemptions > 10, "the pool was not small enough to mean anything"


TIGHT = {"num_blocks": 17, "block_size": 4, "num_slots": 6, "budget": 24}
CASES = [
    TIGHT,
    TIGHT | {"overlap": False},
    TIGHT | {"policy": "priority"},
    TIGHT | {"caching": False},
    TIGHT | {"chunked": False, "budget": 64},
    TIGHT | {"num_slots": 4, "budget": 8},
    TIGHT | {"failing": 0.02},
    TIGHT | {"failing": 0.02, "overlap": False},
    TIGHT | {"num_replicas": 2},
    TIGHT | {"num_replicas": 3, "policy": "priority", "failing": 0.02},
    {"num_blocks": 200, "block_size": 8, "num_slots": 16, "budget": 48},
]


@pytest.mark.parametrize(
    "options", CASES, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items() if TIGHT.get(k) != v)
)
@pytest.mark.parametrize("seed", [0, 1])
def test_answers_do_not_depend_on_company_preemption_aborts_or_failures(options, seed):
    soak(200, seed, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", CASES, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items() if TIGHT.get(k) != v)
)
@pytest.mark.parametrize("seed", range(100, 102))
def test_answers_do_not_depend_on_company_preemption_aborts_or_failures_for_long(options, seed):
    soak(1000, seed, **options)
