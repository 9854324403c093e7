"""Which requests there are, and the prompts they get."""

import itertools
import json
import math
import statistics

import pytest

from jaxserve.errors import ConfigError
from jaxserve.loadgen import dataset
from jaxserve.loadgen.arrivals import peak, random_times, replayed
from jaxserve.loadgen.prompts import Prompts, Vocabulary, load_vocabulary
from jaxserve.loadgen.report import percentile, read_goodput
from jaxserve.loadgen.sse import Events
from jaxserve.model_source import find_model
from jaxserve.workload.call import Call, Span, make_workload


@pytest.fixture(scope="module")
def tiny():
    return load_vocabulary(str(find_model("tiny")))


def random_calls(count=50, seed=0, **lengths):
    return dataset.random_calls(count, dataset.Lengths(**lengths), [0.0] * count, seed).calls


def test_random_lengths_lie_around_what_is_wanted():
    calls = random_calls(prompt=100, answer=20, prefix=7, ratio=0.5)
    assert all(call.prompt[0] == Span(1, 7) for call in calls)
    lengths = [call.prompt[1].length for call in calls]
    assert 50 <= min(lengths) < 80 < 120 < max(lengths) <= 150
    assert len({call.prompt[1].token for call in calls}) == 50
    assert all(10 <= call.output_tokens <= 30 for call in calls)
    assert random_calls(prompt=100, answer=20, prefix=7, ratio=0.5) == calls
    assert random_calls(prompt=100, answer=20, prefix=7, ratio=0.5, seed=1) != calls


@pytest.mark.parametrize(
    "lengths", [{"prompt": 0, "answer": 1}, {"prompt": 1, "answer": 0}, {"prompt": 5, "answer": 1, "ratio": 1.0}]
)
def test_lengths_that_cannot_be(lengths):
    with pytest.raises(ConfigError):
        random_calls(**lengths)


def test_prompts_are_exact_with_a_tokenizer(tiny):
    calls = random_calls(prompt=40, answer=1, prefix=8)
    by_id = {call.call_id: call for call in calls}
    as_ids = [Prompts(tiny, 5, as_ids=True).of(call, by_id, {}) for call in calls]
    texts = [Prompts(tiny, 5, as_ids=False).of(call, by_id, {}) for call in calls]
    assert {len(ids) for ids in as_ids} == {48}
    assert {tiny.count(text) for text in texts} == {48}
    assert len({tuple(ids[:8]) for ids in as_ids}) == 1
    assert len({tuple(ids[8:]) for ids in as_ids}) == 50
    assert Prompts(tiny, 5, as_ids=True).of(calls[3], by_id, {}) == as_ids[3]
    assert Prompts(tiny, 5, as_ids=True).reseeded("w").of(calls[3], by_id, {}) != as_ids[3]
    special = {tiny.ids(token)[0] for token in ("<|endoftext|>",) if len(tiny.ids(token)) == 1}
    assert special.isdisjoint(tiny.plain_ids)


def test_without_a_tokenizer_prompts_are_common_words():
    call = Call(call_id="a", prompt=(Span(1, 12), Span(2, 3)), output_tokens=1)
    assert len(Prompts(Vocabulary(), 0, as_ids=False).of(call, {}, {}).split()) == 15
    assert Vocabulary().count("abcde") == 2


def test_a_tokenizer_that_is_none(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^--tokenizer .*: "):
        load_vocabulary(str(tmp_path))


def sharegpt(path, *talks):
    path.write_text(json.dumps([{"id": "x", "conversations": [{"value": v} for v in talk]} for talk in talks]))
    return path


def test_conversations_of_a_file(tmp_path, tiny):
    good = ["what is the colour of the sky today", "blue, or grey, or black, as it is late"]
    file = sharegpt(tmp_path / "s.json", good, good[:1], ["hi", good[1]], [good[0], "no"], [good[0] * 300, good[1]])
    [(text, asked, answered)] = dataset.read_sharegpt(file, 1, tiny, 0)
    assert (text, asked, answered) == (good[0], tiny.count(good[0]), tiny.count(good[1]))
    assert dataset.read_sharegpt(file, 2, tiny, 0, answer_length=9)[1][2] == 9  # "no" is too short, 9 are not
    with pytest.raises(ConfigError, match="has 1 conversations of a usable length, and 2 are wanted"):
        dataset.read_sharegpt(file, 2, tiny, 0)
    workload, texts = dataset.text_calls([(text, asked, answered)], [0.0])
    prompts = Prompts(tiny, 0, as_ids=True, texts=texts)
    assert prompts.of(workload.calls[0], {}, {}) == tiny.ids(good[0])
    (tmp_path / "bad.json").write_text('[{"conversation": 1}]')
    with pytest.raises(ConfigError, match="is not like ShareGPT"):
        dataset.read_sharegpt(tmp_path / "bad.json", 1, tiny, 0)


def test_random_times_have_the_rate_and_the_burstiness():
    def gaps(burstiness):
        times = random_times(4000, 10, burstiness, seed=1)
        return [b - a for a, b in itertools.pairwise(times)]

    for burstiness, variation in ((1, 1), (0.25, 2), (100, 0.1)):
        found = gaps(burstiness)
        assert statistics.fmean(found) == pytest.approx(0.1, rel=0.1)
        assert statistics.pstdev(found) / statistics.fmean(found) == pytest.approx(variation, rel=0.1)
    assert random_times(3, math.inf, 1, seed=1) == [0, 0, 0]
    for rate, burstiness in ((0, 1), (math.nan, 1), (1, 0), (1, -1)):
        with pytest.raises(ConfigError):
            random_times(3, rate, burstiness, seed=1)


def test_a_trace_keeps_its_pattern():
    calls = [Call(call_id=str(t), prompt=(Span(1, 1),), output_tokens=1, arrival_s=t) for t in (0, 1, 4)]
    trace = make_workload("t", calls)
    assert replayed(trace, None) is trace
    assert [call.arrival_s for call in replayed(trace, 1.0).calls] == [0, 0.5, 2]
    assert [call.arrival_s for call in replayed(trace, math.inf).calls] == [0, 0, 0]


def test_peak_and_percentile():
    assert peak([(0, 2), (1, 3), (2, 4), (2.5, 2.6)]) == 3
    assert peak([]) == 0
    assert percentile([1, 2, 4], 50) == 2
    assert percentile([1, 2, 4], 75) == 3
    assert percentile([7], 99) == 7


def test_goodput_limits():
    assert read_goodput(["ttft:500", "e2el:9e3"]) == {"ttft": 500, "e2el": 9000}
    for pair in ("ttft", "ttft:", "ttft:-1", "ttft:nan", "itl:5"):
        with pytest.raises(ConfigError, match="must be like ttft:500"):
            read_goodput([pair])


def test_events_of_several_lines_and_other_fields():
    events = Events()
    assert events.feed(b": ping\n\nevent: x\ndata: one\r\ndata:two\nid: 3\r\n\r\ndata") == [b"one\ntwo"]
    assert events.feed(b": thr") == []
    assert events.rest() == [b"thr"]
