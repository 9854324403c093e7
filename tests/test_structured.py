"""What answers must look like: what is refused at once, and that a guide sees its answer whatever happens to it on the way.

The model and the grammars are pretend ones (`tests/fakes.py`); real ones are in `tests/sampling/test_grammar.py`.
"""

import dataclasses
import json
import pickle
import random

import pytest

from jaxserve import SamplingParams, StructuredOutputsParams
from jaxserve.errors import ConfigError
from jaxserve.structured import MAX_BYTES
from tests.fakes import EOS, FakeGrammar, alone, ask, check_answer, make_engine

DEEP = json.loads('{"items":' * 70 + "{}" + "}" * 70)
REFUSED = [
    ({}, "says nothing. Give exactly one of json, regex, choice, grammar, json_object"),
    ({"json_object": False}, "says nothing"),
    ({"json": {}, "regex": "a"}, "says json and regex"),
    ({"jsn": {}}, "Did you mean 'json'?"),
    ({1: 2}, "structured_outputs must be an object"),
    ("json", "structured_outputs must be an object, not 'json'"),
    ({"json": "{"}, "structured_outputs.json is no JSON schema"),
    ({"json": "[" * 100_000}, "structured_outputs.json is no JSON schema"),
    ({"json": "[]"}, "must be a JSON schema (an object), not []"),
    ({"json": {"default": {1, 2}}}, "structured_outputs.json is no JSON schema"),
    ({"json": {"default": float("nan")}}, "structured_outputs.json is no JSON schema"),
    ({"json": DEEP}, "nested more than 64 levels deep"),
    ({"json": {"title": "x" * MAX_BYTES}}, f"at most {MAX_BYTES} are supported"),
    ({"regex": ""}, "structured_outputs.regex must be a text that is not empty"),
    ({"regex": 5}, "structured_outputs.regex must be a text"),
    ({"regex": "\ud800"}, "lone surrogate"),
    ({"choice": "yes"}, "structured_outputs.choice must be a list of texts"),
    ({"choice": []}, "structured_outputs.choice must be a list of texts"),
    ({"choice": ["a", 1]}, "structured_outputs.choice must be a list of texts"),
    ({"choice": [""]}, "no choice but the empty text"),
    ({"json_object": 1.5}, "structured_outputs.json_object=1.5 must be True or False"),
    ({"regex": "a", "whitespace_pattern": " "}, "are for JSON, not for regex"),
    ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "contradict each other"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED, ids=lambda v: f"{v!s:.24}")
def test_what_cannot_be_meant_is_refused_at_once(value, message):
    with pytest.raises(ConfigError) as caught:
        SamplingParams(structured_outputs=value)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_mapping_is_as_good_as_the_dataclass():
    schema = {"type": "object", "properties": {"é": {"type": "string"}}}
    made = SamplingParams(structured_outputs={"json": schema}).structured_outputs
    assert (
        made
        == StructuredOutputsParams(json=schema)
        == StructuredOutputsParams(json=json.dumps(schema, ensure_ascii=False))
    )
    assert json.loads(made.json) == schema
    assert hash(made) == hash(StructuredOutputsParams(json=schema))
    assert StructuredOutputsParams(choice=["a", "b"]).kind == "choice"


def mixed(rng: random.Random, name: str) -> tuple:
    """Some requests with a grammar and some without."""
    options = {
        "n": rng.choice((1, 1, 2, 3)),
        "temperature": rng.choice((0.0, 1.0)),
        "seed": rng.randrange(100),
        "max_tokens": rng.randrange(1, 14),
        "min_tokens": rng.choice((0, 0, 1)),
        "ignore_eos": rng.random() < 0.5,
        "stop": ["xy"] if rng.random() < 0.2 else [],
        "bad_word_ids": ((1, 2),) if rng.random() < 0.2 else (),
        "frequency_penalty": rng.choice((0.0, 0.0, 0.5)),
    }
    if rng.random() < 0.6:
        breaks_at = rng.choice((-1, -1, -1, rng.randrange(1, 10)))
        options["grammar"] = FakeGrammar(rng.randrange(5), rng.randrange(1, 14), breaks_at)
    return ask(name, [rng.randrange(1, 5) for _ in range(rng.randrange(1, 24))], **options)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "memory",
    [
        pytest.param({}, id="room"),
        pytest.param({"num_blocks": 16, "num_slots": 4}, id="preempted"),
        pytest.param({"num_blocks": 16, "num_slots": 4, "num_host_blocks": 40}, id="swapped"),
        pytest.param({"num_blocks": 11, "num_slots": 4, "num_replicas": 2, "caching": False}, id="replicas"),
    ],
)
def test_answers_are_those_of_a_request_alone(overlap, memory):
    preemptions, swaps, finishes = 0, 0, set()
    for seed in range(40):
        rng = random.Random(seed)
        rig = make_engine(overlap=overlap, max_model_len=40, **memory)
        requests = [mixed(rng, f"r{i}") for i in range(8)]
        outputs = rig.run(*requests)
        for request in requests:
            check_answer(outputs[request.request_id], request, max_model_len=40)
            for answer in outputs[request.request_id].outputs:
                finishes.add(answer.finish_reason)
                assert answer.error == ("it breaks" if answer.finish_reason == "error" else None)
            assert outputs[request.request_id].error is None
        preemptions += rig.scheduler.counters.preemptions
        swaps += rig.scheduler.counters.swapped
    assert finishes == {"stop", "length", "error"}
    assert bool(preemptions) == ("num_blocks" in memory)
    assert bool(swaps) == ("num_host_blocks" in memory)


@pytest.mark.parametrize("where", ["dispatch", "collect"])
def test_a_failing_step_leaves_guides_of_those_who_wait_as_they_were(where):
    survivors = 0
    for steps in range(2, 24):
        rig = make_engine(num_blocks=16, num_slots=4, max_model_len=40)
        requests = [mixed(random.Random(100 + i), f"r{i}") for i in range(8)]
        for request in requests:
            rig.engine.add(request)
        outputs = {}
        for step in range(200):
            if step == steps:
                rig.executor.fail_next = where
            if not rig.engine.has_work:
                break
            outputs |= {event.request_id: event.output for event in rig.step()}
        for request in requests:
            output = outputs[request.request_id]
            if output.error is None:
                check_answer(output, request, max_model_len=40)
                survivors += request.grammar is not None
    assert survivors > 20


def test_a_grammar_that_is_complete_takes_no_step_for_the_end_token():
    made = [ask("r", [1, 2, 3], grammar=FakeGrammar(salt, length=5), max_tokens=30) for salt in range(50)]
    request, expected = next((r, alone(r)) for r in made if EOS not in alone(r).token_ids)
    assert expected.finish_reason == "stop"
    rig = make_engine(overlap=False)
    output = rig.run(request)["r"].outputs[0]
    assert output.token_ids == expected.token_ids
    assert output.text == expected.text
    assert len(rig.executor.plans) == 5


def test_bans_give_way_to_the_grammar():
    """`min_tokens` holds the end token back, until there is nothing else."""
    only_end = dataclasses.make_dataclass("OnlyEnd", [])
    only_end.start = lambda self: OnlyEndGuide()
    request = ask("r", [1], grammar=only_end(), min_tokens=5, max_tokens=9, ignore_eos=True)
    output = make_engine().run(request)["r"].outputs[0]
    assert (output.token_ids, output.finish_reason) == ([EOS], "stop")


class OnlyEndGuide:
    is_done, error = False, ""

    def mask(self) -> bytes:
        return (1 << EOS).to_bytes(4, "little")

    def advance(self, token_id: int) -> None:
        raise AssertionError("an end token is no part of the answer")


def test_a_schema_does_not_travel_with_every_step():
    request = ask("r", [1], grammar=FakeGrammar(), structured_outputs={"regex": "x" * 10_000})
    rig = make_engine()
    rig.run(request)
    assert all(len(pickle.dumps(plan)) < 2000 for plan in rig.executor.plans)
    assert all(row.mask for plan in rig.executor.plans for row in plan.rows)
