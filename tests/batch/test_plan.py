"""run-batch plans: prompts that begin alike start together, every line is answered, and no pin is left behind."""

import itertools
import json
import random

import pytest

from jaxserve.batch.job import Reader, parse_job
from jaxserve.batch.plan import planned
from jaxserve.cli.run_batch import model_of
from jaxserve.openai.errors import ApiError
from tests.cli.fake_llm import FakeEngine, FakeLLM
from tests.cli.test_run_batch import by_id, line, say

HEADS = ["a" * 32, "b" * 64, "c" * 40]


def shuffled_lines(**body):
    """Twelve prompts with three beginnings, and some that share nothing."""
    names = [f"{which}-{number}" for which in range(3) for number in range(4)]
    lines = [line(name, prompt=HEADS[int(name[0])] + name, max_tokens=2, **body) for name in names]
    lines += [line(f"alone-{number}", prompt=f"{number} alone", max_tokens=2) for number in range(3)]
    random.Random(0).shuffle(lines)
    return lines


def test_prompts_that_begin_alike_start_together_and_are_unpinned_at_the_end(batch, fake_llm):
    results = by_id(batch(shuffled_lines()))
    assert len(results) == 15 and not any(result["error"] for result in results.values())
    submitted = fake_llm.last.submitted
    pins = [(request.pin, request.pin_tokens) for request in submitted if request.pin]
    assert len(pins) == 12
    assert [tokens for (_, tokens), _ in itertools.groupby(pins)] == [32, 64, 32], "most written per token first"
    assert sorted(fake_llm.last.unpinned) == sorted({name for name, _ in pins})
    assert "15 prompts, groups that begin alike: 3; 384 of " in batch.done.err


@pytest.mark.parametrize("options", [["--scheduling-policy", "fcfs"], ["--no-enable-prefix-caching"]])
def test_without_plan_the_order_is_that_of_the_file(batch, fake_llm, options):
    lines = shuffled_lines()
    batch(lines, *options)
    prompts = [json.loads(text)["body"]["prompt"] for text in lines]
    assert [bytes(request.prompt_token_ids).decode() for request in fake_llm.last.submitted] == prompts
    assert not any(request.pin for request in fake_llm.last.submitted)
    assert fake_llm.last.unpinned == []
    assert "begin alike" not in batch.done.err


def test_only_what_is_not_answered_is_planned(batch, fake_llm):
    lines = shuffled_lines()
    batch(lines)
    kept = batch.target.read_bytes().splitlines(keepends=True)[:10]
    batch.target.write_bytes(b"".join(kept))
    assert len(by_id(batch(lines))) == 15
    assert len(fake_llm.last.submitted) == 5
    assert "5 prompts, " in batch.done.err


def test_members_that_are_refused_or_fail_count_as_ended(batch, fake_llm):
    head = HEADS[1]
    lines = [line("long", prompt=head + "x" * 50), line("bug", prompt=head + "crash"), line("good", prompt=head + "y")]
    lines.append(line("half", prompt=[list(head.encode()) + [7], [9] * 101]))
    results = by_id(batch(lines))
    assert [name for name, result in results.items() if not result["error"]] == ["good"]
    assert len(fake_llm.last.unpinned) == len(set(fake_llm.last.unpinned)) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_run_that_ends_early_unpins_what_it_began(batch, fake_llm, monkeypatch, error):
    step = FakeEngine.step

    def interrupted(self):
        if self.num_steps == 3:
            raise error
        return step(self)

    monkeypatch.setattr(FakeEngine, "step", interrupted)
    if error is KeyboardInterrupt:
        batch(shuffled_lines(), "--max-num-seqs", "2")
    else:
        with pytest.raises(error):
            batch(shuffled_lines(), "--max-num-seqs", "2")
    began = {request.pin for request in fake_llm.last.submitted} - {""}
    assert began
    assert sorted(fake_llm.last.unpinned) == sorted(began)


def test_chats_embeddings_several_prompts_and_answers_are_planned_too(batch, fake_llm):
    head = "d" * 64
    lines = [line(f"chat{n}", "/v1/chat/completions", messages=say(head + str(n)), max_tokens=3) for n in range(2)]
    lines += [line(f"embed{n}", "/v1/embeddings", input=[head + str(n), "x"]) for n in range(2)]
    lines += [line(f"two{n}", prompt=[head + f"{n}{m}" for m in range(2)], n=2, max_tokens=1) for n in range(2)]
    lines += [line("echo", prompt=head + "!", echo=True, max_tokens=1)]
    lines += [line("scored", prompt=head + "?", echo=True, logprobs=1, max_tokens=0)]
    results = by_id(batch(lines))
    assert not any(result["error"] for result in results.values())
    body = {name: result["response"]["body"] for name, result in results.items()}
    assert [choice["text"] for choice in body["two1"]["choices"]] == ["D"] * 4
    assert body["echo"]["choices"][0]["text"] == head + "!" + "D"
    assert body["chat1"]["choices"][0]["message"]["content"] == "<US"
    assert [len(row["embedding"]) for row in body["embed0"]["data"]] == [2, 2]
    by_pin = {}
    for request in fake_llm.last.submitted:
        by_pin.setdefault(request.pin, []).append(bytes(request.prompt_token_ids).decode())
    groups = sorted(len(prompts) for name, prompts in by_pin.items() if name)
    assert groups == [2, 7], "two chats; embeddings, completions and the echo"
    assert head + "?" in by_pin[""], "a prompt that is scored can take nothing from the cache"


def items_of(lines):
    for number, text in enumerate(lines, start=1):
        raw = json.loads(text)
        yield number, raw["custom_id"], parse_job(raw, Reader(model=model_of(FakeLLM("m"), ["m"])))


def test_a_large_batch_is_planned_part_by_part():
    said, lines = [], shuffled_lines()
    wrong = (99, None, ApiError("no"))
    items = list(planned(FakeLLM("m"), itertools.chain(items_of(lines), [wrong]), said.append, most_tokens=5 * 1024))
    assert [text.split()[0] for text in said] == ["5", "5", "5"]
    assert sorted(number for number, _, _ in items) == [*range(1, 16), 99]
    pins = [pin for _, _, job in items if not isinstance(job, ApiError) for pin in job.pins if pin]
    for name, members in itertools.groupby(sorted(pins), key=lambda pin: pin.name):
        assert len(list(members)) == next(pin.num_members for pin in pins if pin.name == name)


def test_the_urgent_go_first_with_their_group():
    lines = shuffled_lines()
    chosen = json.loads(lines[5])
    chosen["body"]["priority"] = -1
    lines[5] = json.dumps(chosen)
    first, *_ = planned(FakeLLM("m"), items_of(lines), lambda text: None)
    assert first[1][:2] == chosen["custom_id"][:2]


def test_metadata_reaches_the_request(batch, fake_llm):
    meta = {"client": "c", "program": "p", "stage": "s", "priority": 2, "deadline_ms": 1500}
    batch([line("first", **meta), line("second", parents=["first", "unknown"], **meta), line("third")])
    first, second, third = sorted(fake_llm.last.submitted, key=lambda request: -len(request.prompt_token_ids))[:3]
    by_prompt = {bytes(r.prompt_token_ids).decode(): r for r in (first, second, third)}
    first, second, third = (by_prompt[name] for name in ("first", "second", "third"))
    assert (first.client, first.program, first.stage, first.priority, first.deadline_s) == ("c", "p", "s", 2, 1.5)
    assert second.parents == (first.request_id,)
    assert (third.client, third.program, third.priority, third.deadline_s) == ("", "", 0, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("client", 1),
        ("program", []),
        ("parents", "first"),
        ("parents", [1]),
        ("priority", "high"),
        ("priority", float("nan")),
        ("deadline_ms", -1),
        ("deadline_ms", True),
        ("stage", {}),
    ],
)
def test_wrong_metadata_is_refused_by_name(batch, name, value):
    wrong, right = batch([line("wrong", **{name: value}), line("right")])
    assert wrong["error"]["code"] == "invalid_request"
    assert wrong["response"]["body"]["error"]["param"].split("[")[0] == name
    assert right["error"] is None
