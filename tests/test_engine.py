"""What the engine makes of tokens: text, stop strings, ends, log-probabilities, aborts. The model is a pretend one."""

import random

import pytest

from jaxserve.errors import RequestError
from jaxserve.request import MAX_BANNED, Task
from tests.fakes import EOS, PIECES, VOCAB_SIZE, FakeTokenizer, alone, ask, check_answer, make_engine, score


def answer(rig, request):
    return rig.run(request)[request.request_id].outputs[0]


def seeded(request_id: str, seed: int, **options):
    """A sampled request that goes on for 20 tokens unless told otherwise."""
    options = {"temperature": 1.0, "seed": seed, "max_tokens": 20, "ignore_eos": True} | options
    return ask(request_id, [1, 2, 3], **options)


def events_of(rig, request) -> list:
    rig.engine.add(request)
    events = []
    while rig.engine.has_work:
        events += rig.step()
    return events


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_an_answer_ends_at_a_stop_string_wherever_tokens_end(overlap, include):
    """Every piece of every unstopped answer, taken as a stop string: most begin or end inside a token."""
    rig = make_engine(overlap=overlap)
    for seed in range(6):
        text = alone(seeded("r", seed)).text
        for begin in range(0, len(text) - 3, 3):
            stop = text[begin : begin + 3]
            if "é" in stop:
                continue  # the pretend tokenizer delays it
            request = seeded("r", seed, stop=[stop], include_stop_str_in_output=include)
            got = answer(rig, request)
            assert got.finish_reason == "stop"
            assert got.stop_reason == stop
            assert got.text == text[: text.index(stop) + (len(stop) if include else 0)]


@pytest.mark.parametrize("overlap", [True, False])
def test_streamed_text_is_the_final_text_and_nothing_of_a_stop_string_slips_out(overlap):
    rig = make_engine(overlap=overlap)
    for seed in range(40):
        request = seeded("r", seed, stop=["abx", "y c", "bbbb", "q"], include_stop_str_in_output=seed % 2 == 0)
        text = ""
        for event in events_of(rig, request):
            text += event.text
            assert event.output.outputs[0].text.startswith(text)
        final = alone(request)
        assert text == final.text
        check_answer(event.output, request)
        assert event.finish_reason == final.finish_reason


def test_a_stop_string_inside_the_min_tokens_part_is_never_found_later():
    rig = make_engine()
    for seed in range(40):
        request = seeded("r", seed, stop=["a", "bxyzbxyz"], min_tokens=6)
        streamed = "".join(event.text for event in events_of(rig, request))
        expected = alone(request)
        assert streamed == expected.text
        assert len(expected.token_ids) >= 6


def test_an_answer_ends_at_its_end_token_unless_that_is_ignored():
    rig = make_engine()
    ended = 0
    for seed in range(30):
        request = seeded("r", seed, ignore_eos=False)
        got, free = answer(rig, request), alone(seeded("r", seed))
        if EOS in free.token_ids:
            ended += 1
            assert got.token_ids == free.token_ids[: free.token_ids.index(EOS) + 1]
            assert (got.finish_reason, got.stop_reason) == ("stop", None)
            assert got.text == FakeTokenizer().decode(got.token_ids)
        else:
            assert (got.token_ids, got.finish_reason) == (free.token_ids, "length")
    assert ended > 3


@pytest.mark.parametrize("include", [True, False])
def test_stop_tokens_end_an_answer_and_are_named(include):
    rig = make_engine()
    free = alone(seeded("r", 1))
    stop = free.token_ids[5]
    first = free.token_ids.index(stop)
    got = answer(rig, seeded("r", 1, stop_token_ids=[stop], include_stop_str_in_output=include))
    assert got.token_ids == free.token_ids[: first + 1]
    assert (got.finish_reason, got.stop_reason) == ("stop", stop)
    assert got.text == FakeTokenizer().decode(got.token_ids[: first + include])


def test_special_tokens_are_kept_when_asked_for():
    rig = make_engine()
    request = ask("r", [1], max_tokens=20, temperature=1.0, seed=0, ignore_eos=True, skip_special_tokens=False)
    seeds = (s for s in range(100) if EOS in alone(seeded("r", s)).token_ids)
    request = seeded("r", next(seeds), skip_special_tokens=False)
    assert "<eos>" in answer(rig, request).text


def test_before_min_tokens_no_end_token_is_chosen():
    rig = make_engine()
    for seed in range(30):
        request = seeded("r", seed, ignore_eos=False, min_tokens=15, stop_token_ids=[4, 5])
        got = answer(rig, request)
        assert not {EOS, 4, 5} & set(got.token_ids[:15])
        assert len(got.token_ids) >= 15


@pytest.mark.parametrize("overlap", [True, False])
def test_one_token_is_one_step_and_no_row_is_wasted(overlap):
    rig = make_engine(overlap=overlap)
    got = answer(rig, ask("r", [1, 2], max_tokens=1, ignore_eos=True))
    assert len(got.token_ids) == 1
    assert got.finish_reason == "length"
    assert len(rig.executor.plans) == 1
    assert rig.scheduler.counters.wasted_rows == 0


def test_without_max_tokens_an_answer_fills_the_context():
    rig = make_engine(max_model_len=32)
    got = answer(rig, ask("r", [1] * 10, max_tokens=None, min_tokens=22))
    assert len(got.token_ids) == 22
    assert got.finish_reason == "length"


def test_bad_words_of_one_and_of_several_tokens_do_not_appear():
    rig = make_engine()
    hits = 0
    for seed in range(20):
        free = alone(seeded("r", seed)).token_ids
        words = ((free[2],), tuple(free[5:7]), tuple(free[9:12]))
        request = seeded("r", seed, bad_word_ids=words)
        got = answer(rig, request).token_ids
        for word in words:
            assert word not in [tuple(got[i : i + len(word)]) for i in range(len(got))]
        hits += got != free
    assert hits == 20


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("steps", range(8))
def test_an_abort_at_any_time_frees_everything_and_disturbs_nobody(overlap, steps):
    rig = make_engine(overlap=overlap, budget=8)
    gone = ask("gone", [1] * 20, n=2, max_tokens=20, min_tokens=20)
    stays = seeded("stays", 3)
    rig.engine.add(gone)
    rig.engine.add(stays)
    for _ in range(steps):
        rig.step()
    events = rig.engine.abort("gone")
    rig.scheduler.check()
    assert [(e.index, e.finish_reason) for e in events] == [(0, "abort"), (1, "abort")]
    assert events[-1].output.finished
    assert rig.engine.abort("gone") == []
    output = rig.run()["stays"]
    check_answer(output, stays)


def test_aborting_when_one_of_two_answers_has_ended_ends_the_other_only():
    rig = make_engine()
    seeds = (s for s in range(500) if len(alone(seeded("r", s, stop=["a"]), 0).token_ids) == 1)
    request = next(r for r in (seeded("r", s, n=2, stop=["a"]) for s in seeds) if len(alone(r, 1).token_ids) > 6)
    rig.engine.add(request)
    events = []
    while not events or not events[-1].finish_reason:
        events += rig.step()
    ended = rig.engine.abort("r")
    assert [(e.index, e.finish_reason) for e in ended] == [(1, "abort")]
    assert [o.finish_reason for o in ended[0].output.outputs] == ["stop", "abort"]
    rig.run()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("where", ["dispatch", "collect"])
@pytest.mark.parametrize("steps", range(6))
def test_a_failing_step_ends_who_has_begun_and_nobody_else(overlap, where, steps):
    rig = make_engine(overlap=overlap, num_slots=2, budget=8)
    begun = [ask("prompt", [1] * 30, max_tokens=20, min_tokens=20), seeded("two", 4, n=2)]  # of two, one has a slot
    waits = seeded("waits", 3)
    for request in (*begun, waits):
        rig.engine.add(request)
    for _ in range(5 + steps):  # the first five only compute the long prompt
        rig.step()
    rig.executor.fail_next = where
    events = rig.step()
    while rig.executor.fail_next:  # with overlap a step may pass before anything is collected
        events = rig.step()
    assert sorted((e.request_id, e.index) for e in events) == [("prompt", 0), ("two", 0), ("two", 1)]
    assert {e.finish_reason for e in events} == {"error"}
    assert all(e.output.finished and e.output.error == f"{where} failed" for e in events)
    assert (rig.store.num_held, rig.store.num_available) == (0, 64)
    assert rig.engine.failed_steps == 1
    outputs = rig.run()
    assert list(outputs) == ["waits"]
    assert outputs["waits"].error is None
    check_answer(outputs["waits"], waits)


@pytest.mark.parametrize("where", ["dispatch", "collect"])
def test_who_was_preempted_while_in_a_failing_step_ends_too(where):
    """It holds no block any more, but its token will never come."""
    hits = 0
    for steps in range(1, 60):
        rig = make_engine(num_blocks=12, max_model_len=44)
        requests = [seeded(f"r{index}", index, max_tokens=25) for index in range(6)]
        for request in requests:
            rig.engine.add(request)
        for _ in range(steps):
            rig.step()
        before = rig.scheduler.counters.preemptions
        rig.executor.fail_next = where
        rig.step()
        hits += rig.scheduler.counters.preemptions > before
        outputs = rig.run()  # comes to an end
        for request in requests:
            if request.request_id in outputs and not outputs[request.request_id].error:
                check_answer(outputs[request.request_id], request, max_model_len=44)
    assert hits > 3, "no step preempted and failed"


def test_after_a_failing_step_no_cached_prefix_is_trusted():
    rig = make_engine()
    prompt = list(range(1, 17))
    rig.run(ask("before", prompt, max_tokens=4))
    rig.executor.fail_next = "collect"
    assert rig.run(ask("fails", prompt, max_tokens=4))["fails"].metrics.num_cached_tokens > 0
    again = ask("again", prompt, max_tokens=4)
    output = rig.run(again)["again"]
    assert output.metrics.num_cached_tokens == 0
    check_answer(output, again)


@pytest.mark.parametrize("where", ["dispatch", "collect"])
def test_when_every_step_fails_every_request_ends(where):
    rig = make_engine(num_slots=2)
    for index in range(9):
        rig.engine.add(seeded(f"r{index}", index))
    ended = []
    while rig.engine.has_work:
        rig.executor.fail_next = where
        ended += [event.request_id for event in rig.step() if event.output.error]
    assert sorted(ended) == [f"r{index}" for index in range(9)]
    rig.check_empty()


def test_an_id_can_be_used_again_at_once():
    """Also while the wasted row of its last use is under way."""
    rig = make_engine()
    for seed in range(30):
        request = seeded("same", seed, ignore_eos=False, stop=["b"])
        rig.engine.add(request)
        output = None
        while output is None or not output.finished:
            for event in rig.step():
                output = event.output
        check_answer(output, request)
    for _ in range(3):
        rig.engine.add(seeded("same", 1))
        rig.step()
        rig.step()
        rig.engine.abort("same")
    request = seeded("same", 2)
    check_answer(rig.run(request)["same"], request)


def test_an_id_in_use_is_refused_and_the_first_request_goes_on():
    rig = make_engine()
    first = seeded("r", 1)
    rig.engine.add(first)
    with pytest.raises(ValueError, match="'r' is in use"):
        rig.engine.add(seeded("r", 2))
    check_answer(rig.run()["r"], first)


BAD = {
    "empty": (lambda: ask("bad", []), "the prompt is empty"),
    "negative": (lambda: ask("bad", [1, -1]), "token id -1"),
    "unknown": (
        lambda: ask("bad", [1, VOCAB_SIZE]),
        f"token id {VOCAB_SIZE} is outside the vocabulary of {VOCAB_SIZE}",
    ),
    "huge": (lambda: ask("bad", [1 << 80]), "outside the vocabulary"),
    "long": (lambda: ask("bad", [1] * 64), "64 tokens, and max_model_len=64"),
    "scored": (lambda: ask("bad", [1] * 65, task=Task.SCORE), "65 tokens"),
    "stop token": (lambda: ask("bad", [1], stop_token_ids=[999]), "token id 999"),
    "bias": (lambda: ask("bad", [1], logit_bias={1 << 40: 1.0}), "outside the vocabulary"),
    "allowed": (lambda: ask("bad", [1], allowed_token_ids=[VOCAB_SIZE]), "outside the vocabulary"),
    "held back": (lambda: ask("bad", [1], bad_word_ids=((1,),) * 70), f"at most {MAX_BANNED}"),
    "priority": (lambda: ask("bad", [1], priority="high"), "priority='high'"),
    "no word": (lambda: ask("bad", [1], bad_word_ids=((),)), "bad word"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_refused_request_leaves_the_engine_as_it_was(name):
    make, message = BAD[name]
    rig = make_engine()
    other = seeded("other", 1)
    rig.engine.add(other)
    rig.step()
    with pytest.raises(RequestError, match=message):
        rig.engine.add(make())
    rig.scheduler.check()
    assert rig.engine.abort("bad") == []
    check_answer(rig.run()["other"], other)


@pytest.mark.parametrize("count", [0, 3])
def test_logprobs_hold_the_chosen_token_and_as_many_alternatives_as_asked_for(count):
    rig = make_engine()
    request = seeded("r", 5, logprobs=count)
    got = answer(rig, request)
    assert len(got.logprobs) == len(got.token_ids) == 20
    for index, (table, token) in enumerate(zip(got.logprobs, got.token_ids, strict=True)):
        assert next(iter(table)) == token
        expected = score([1, 2, 3, *got.token_ids[:index]], token, count)
        assert table[token].logprob == expected.logprob
        assert table[token].decoded_token == PIECES[token]
        assert set(table) == {token, *range(count)}
    total = sum(table[t].logprob for table, t in zip(got.logprobs, got.token_ids, strict=True))
    assert got.cumulative_logprob == pytest.approx(total)


def test_without_logprobs_there_are_none():
    got = answer(make_engine(), seeded("r", 5))
    assert got.logprobs is None
    assert got.cumulative_logprob is None


def test_prompt_logprobs_survive_preemption_and_cached_prefixes():
    rng = random.Random(1)
    rig = make_engine(num_blocks=12, max_model_len=44, budget=6)
    prefix = [rng.randrange(1, VOCAB_SIZE) for _ in range(10)]
    requests = [
        ask(f"r{i}", [*prefix, i + 1], prompt_logprobs=2, max_tokens=25, min_tokens=25, n=1 + i % 2) for i in range(6)
    ]
    outputs = rig.run(*requests)
    assert rig.scheduler.counters.preemptions > 0
    for request in requests:
        prompt, output = list(request.prompt_token_ids), outputs[request.request_id]
        check_answer(output, request, max_model_len=44)
        assert output.prompt_logprobs[0] is None
        for position in range(1, len(prompt)):
            expected = score(prompt[:position], prompt[position], 2)
            assert output.prompt_logprobs[position][prompt[position]].logprob == expected.logprob


def test_an_engine_without_tokenizer_deals_in_ids_only():
    rig = make_engine()
    rig.engine._tokenizer = None
    request = seeded("r", 1, logprobs=1)
    got = answer(rig, request)
    assert got.token_ids == alone(request).token_ids
    assert got.text == ""
    assert got.logprobs[0][got.token_ids[0]].decoded_token is None


def test_events_of_all_answers_carry_each_token_once():
    rig = make_engine()
    request = seeded("r", 1, n=3)
    tokens: dict[int, list[int]] = {}
    for event in events_of(rig, request):
        tokens.setdefault(event.index, []).extend(event.token_ids)
    assert [tokens[i] for i in range(3)] == [alone(request, i).token_ids for i in range(3)]


def test_metrics_tell_when_and_how_much_was_cached():
    rig = make_engine()
    rig.clock.advance(5)
    rig.run(ask("first", [1, 2, 3, 4, 5, 6, 7, 8, 9], max_tokens=4, min_tokens=4))
    metrics = rig.run(ask("second", [1, 2, 3, 4, 5, 6, 7, 8, 1], max_tokens=4, min_tokens=4))["second"].metrics
    assert 5 < metrics.arrival_s < metrics.first_token_s < metrics.finished_s
    assert metrics.num_cached_tokens == 8


def test_metrics_tell_when_a_queued_request_was_begun():
    rig = make_engine(num_slots=1)
    outputs = rig.run(ask("first", [1, 2, 3], max_tokens=6, ignore_eos=True), ask("queued", [4, 5], max_tokens=2))
    first, queued = outputs["first"].metrics, outputs["queued"].metrics
    assert first.started_s == first.arrival_s < first.first_token_s
    assert queued.arrival_s < first.finished_s <= queued.started_s < queued.first_token_s


def test_a_preempted_request_was_begun_once_and_one_that_never_ran_not_at_all():
    rig = make_engine(num_blocks=8, num_slots=2)
    requests = [ask(name, [first, *range(8)], max_tokens=16, ignore_eos=True) for first, name in enumerate("ab")]
    outputs = rig.run(*requests)
    assert outputs["a"].metrics.num_preemptions + outputs["b"].metrics.num_preemptions > 0
    assert all(output.metrics.started_s < output.metrics.first_token_s for output in outputs.values())
    rig.engine.add(ask("never", [1, 2]))
    (event,) = rig.engine.abort("never")
    assert event.output.metrics.started_s is None
