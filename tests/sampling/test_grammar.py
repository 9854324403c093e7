"""Real grammars on the bundled model: every answer is what was asked for, whatever runs beside it.

What happens to a guided answer on its way (preemption, swaps, failing steps) is tried much harder with pretend grammars, in
`tests/test_structured.py`.
"""

import asyncio
import dataclasses
import json
import random
import re
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve import LLM, AsyncEngine, SamplingParams
from jaxserve.errors import RequestError, UnavailableError
from jaxserve.intake import Intake
from jaxserve.sampling import grammar
from jaxserve.sampling.logits import mask_words, obey, unpack
from jaxserve.sharding.mesh import Parallel, make_mesh
from jaxserve.structured import StructuredOutputsParams

# Four rows at a time, and a pool in which long ones displace each other. One set of shapes for all engines here.
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 8,
    "num_kv_blocks": 20,
    "max_model_len": 160,
    "progress": False,
}
PROMPT = "def add(a, b):"
VOCAB = 1024


@pytest.fixture(scope="module")
def llm():
    llm = LLM("tiny", **OPTIONS)
    yield llm
    assert llm.metrics()["compiles_after_ready"] == 0


@pytest.fixture(scope="module")
def grammars(llm: LLM) -> grammar.Grammars:
    return grammar.Grammars(llm.tokenizer.as_json, VOCAB, (2,))


def asking(seed: int | None = None, **wanted: Any) -> SamplingParams:
    """Greedy, or drawn with a seed."""
    options = {k: wanted.pop(k) for k in list(wanted) if k in {f.name for f in dataclasses.fields(SamplingParams)}}
    drawn = {"temperature": 1.2, "seed": seed} if seed is not None else {"temperature": 0.0}
    return SamplingParams(**{"max_tokens": 200} | drawn | options, structured_outputs=wanted)


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema with short answers."""
    kinds = ["string", "integer", "boolean", "null", "enum", "pattern"]
    kind = rng.choice(kinds + ["object", "object", "array", "anyOf"] * (depth > 0))
    if kind == "object":
        names = rng.sample(["name", "b", "x y", 'q"', "é"], rng.randrange(1, 4))
        properties = {name: random_schema(rng, depth - 1) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": rng.randrange(2), "maxItems": 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1), random_schema(rng, depth - 1)]}
    low = rng.randrange(-50, 50)
    return {
        "string": {"type": "string", "maxLength": rng.randrange(1, 8)},
        "integer": {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1, 1000)},
        "enum": {"enum": ["red", 5, None, "grün", {"a": [1]}]},
        "pattern": {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]+$", "maxLength": 9},
    }.get(kind, {"type": kind})


def test_answers_to_random_schemas_parse_and_validate(llm: LLM):
    schemas = [random_schema(random.Random(seed)) for seed in range(24)]
    params = [
        asking(seed, json=schema, disable_any_whitespace=True)
        for number, schema in enumerate(schemas)
        for seed in (None, number)
    ]
    for wanted, output in zip(params, llm.generate([PROMPT] * len(params), params), strict=True):
        (answer,) = output.outputs
        assert answer.finish_reason == "stop", (wanted.structured_outputs, answer)
        jsonschema.validate(json.loads(answer.text), json.loads(wanted.structured_outputs.json))


def test_blanks_are_allowed_or_not(llm: LLM):
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    plain, some = llm.generate(
        [PROMPT] * 2,
        [asking(json=schema, disable_any_whitespace=True), asking(json=schema, whitespace_pattern="~~")],
    )
    assert plain.outputs[0].text == '{"a":1}'
    assert re.fullmatch('{(~~)?"a"(~~)?:(~~)?1(~~)?}', some.outputs[0].text)
    (any_object,) = llm.generate(PROMPT, asking(json_object=True, disable_any_whitespace=True))
    assert isinstance(json.loads(any_object.outputs[0].text), dict)


REGEXES = ["[a-f]{3}-[0-9]{4}", "(yes|no)( |\n)x+y", "é[ü-þ]{2}z?", r"\d{1,3}(\.\d{1,3}){3}", "😀|a😀b", " {3}x"]
CHOICES = ["yes", "yes!", "no", 'say "hi"', "back\\slash", "two\nlines", "", "a\x7fb\x85", "é😀"]
LARK = 'start: "(" start ")" | "x"'
GBNF = 'root ::= "[" item ("," item)* "]"\nitem ::= [a-c]+ | "é"'


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_expressions_choices_and_grammars_are_followed(llm: LLM, seed: int | None):
    wanted = [{"regex": regex} for regex in REGEXES]
    wanted += [{"choice": CHOICES[begin:]} for begin in range(6)] + [
        {"choice": [choice]} for choice in CHOICES if choice
    ]
    wanted += [{"grammar": LARK}, {"grammar": GBNF}]
    outputs = llm.generate([PROMPT] * len(wanted), [asking(seed, max_tokens=60, **one) for one in wanted])
    for one, output in zip(wanted, outputs, strict=True):
        text, finish = output.outputs[0].text, output.outputs[0].finish_reason
        if "regex" in one:
            assert re.fullmatch(one["regex"], text), one
        elif "choice" in one:
            assert text in one["choice"]
        elif one["grammar"] is LARK:
            depth = text.count("(")
            assert text == "(" * depth + "x" + ")" * depth if finish == "stop" else "(((" in text
        else:
            assert re.fullmatch(r"\[([a-c]+|é)(,([a-c]+|é))*\]", text) if finish == "stop" else text[0] == "["


def mixed() -> tuple[list[str], list[SamplingParams]]:
    """Some with grammars and some without, so long that they displace each other."""
    schema = {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 8, "maxItems": 8}
    params = [
        asking(json=schema, disable_any_whitespace=True),
        SamplingParams(temperature=0.0, max_tokens=90, ignore_eos=True),
        asking(3, regex="([a-z]{2,9} ){12}"),
        asking(4, json=schema, n=3, disable_any_whitespace=True),
        SamplingParams(temperature=0.9, seed=5, max_tokens=90, ignore_eos=True),
        asking(5, grammar='start: WORD ("," WORD){9}\nWORD: /[a-z]{3,8}/', frequency_penalty=0.5, logprobs=2),
    ]
    return ["class Stack:\n    def push(self, item):\n        " + "# x\n" * i for i in range(len(params))], params


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[Any]:
    return [llm.generate(prompt, one)[0].outputs for prompt, one in zip(*mixed(), strict=True)]


def test_answers_do_not_depend_on_who_runs_beside_them(llm: LLM, alone: list[Any]):
    assert all(answer.finish_reason == "stop" for one in (0, 2, 3, 5) for answer in alone[one])
    before = llm.metrics()["preemptions"]
    together = llm.generate(*mixed())
    assert_same(together, alone)
    assert llm.metrics()["preemptions"] > before


def assert_same(outputs: list[Any], alone: list[Any]) -> None:
    """Everything but the last bits of log-probabilities."""
    for output, answers in zip(outputs, alone, strict=True):
        got = [dataclasses.replace(a, logprobs=None, cumulative_logprob=None) for a in output.outputs]
        assert got == [dataclasses.replace(a, logprobs=None, cumulative_logprob=None) for a in answers]
        sums = [a.cumulative_logprob for a in output.outputs if a.cumulative_logprob is not None]
        assert sums == pytest.approx([a.cumulative_logprob for a in answers if a.logprobs is not None], abs=1e-3)


@pytest.mark.parametrize("options", [{"async_scheduling": False}, {"enable_prefix_caching": False}], ids=str)
def test_answers_do_not_depend_on_overlap_or_on_the_prefix_cache(options: dict[str, Any], alone: list[Any]):
    other = LLM("tiny", **OPTIONS, **options)
    assert_same(other.generate(*mixed()), alone)
    assert other.metrics()["compiles_after_ready"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"swap_space": 0.01, "preemption_mode": "swap"},
        {"data_parallel_size": 2, "tensor_parallel_size": 2},
    ],
    ids=str,
)
def test_answers_do_not_depend_on_memory_or_mesh(options: dict[str, Any], alone: list[Any]):
    other = LLM("tiny", **OPTIONS, **options)
    assert_same(other.generate(*mixed()), alone)
    assert other.metrics()["compiles_after_ready"] == 0
    assert other.metrics()["swapped"] or "swap_space" not in options


@pytest.mark.parametrize(
    "options",
    [
        {"min_tokens": 30},
        {"bad_words": ["a", "b", "c"]},
        {"allowed_token_ids": [400, 500]},
        {"logit_bias": {2: 100.0, 500: 100.0}},
        {"ignore_eos": True},
        {"stop_token_ids": [500], "presence_penalty": 2.0},
        {"temperature": 1.0, "top_p": 0.01, "top_k": 1, "min_p": 0.9, "seed": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_no_option_leads_out_of_the_grammar(llm: LLM, options: dict[str, Any]):
    expression = "[abc]{4}(-[abc]{4})?"
    (output,) = llm.generate(PROMPT, asking(**options, max_tokens=40, regex=expression))
    assert re.fullmatch(expression, output.outputs[0].text), output.outputs[0]
    assert output.outputs[0].finish_reason == "stop"


def test_an_answer_cut_off_is_the_beginning_of_one(llm: LLM):
    (long,) = llm.generate(PROMPT, asking(max_tokens=9, regex="[a-z]{100}"))
    assert (long.outputs[0].finish_reason, len(long.outputs[0].token_ids)) == ("length", 9)
    assert re.fullmatch("[a-z]+", long.outputs[0].text)
    (stopped,) = llm.generate(PROMPT, asking(stop=[",b"], regex="a,b,c,d"))
    assert (stopped.outputs[0].text, stopped.outputs[0].stop_reason) == ("a", ",b")


def test_log_probabilities_are_those_of_the_plain_model(llm: LLM):
    (output,) = llm.generate(PROMPT, asking(logprobs=3, regex="[xyz]{6}"))
    (answer,) = output.outputs
    (plain,) = llm.score({"prompt_token_ids": output.prompt_token_ids}, [answer.token_ids])
    assert answer.cumulative_logprob == pytest.approx(plain.logprob, abs=1e-3)
    assert plain.logprob < -10, "so unlikely an answer shows that the mask is not in it"


# Each once crashed the library, or kept it busy for seconds, or for ever.
DEFINITIONS = {f"a{i}": {"items": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}]}} for i in range(2000)}
HOSTILE: dict[str, dict[str, Any]] = {
    "overruns the stack": {"json": {"$ref": "#/$defs/a0", "$defs": DEFINITIONS | {"a2000": {}}}},
    "overruns it, too": {"grammar": "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(9000)) + 'a9000: "x"'},
    "nested": {"regex": "(" * 9000 + "a" + ")" * 9000},
    "nested GBNF": {"grammar": "root ::= " + "(" * 9000 + '"a"' + ")" * 9000},
    "large once expanded": {"regex": "a{1000000000}"},
    "refers to itself": {"json": {"$ref": "#"}},
    "has no answer": {"json": {"type": "integer", "minimum": 2, "maximum": 1}},
    "from elsewhere": {"json": {"$ref": "file:///etc/passwd"}},
    "many names": {"json": {"enum": [f"a{i}" * 5 for i in range(8000)], "not": {}}},
    "many optional parts": {"json": {"type": "object", "properties": {f"k{i}": {} for i in range(1000)}}},
    "syntax": {"regex": "[a"},
    "look-around": {"regex": "(?=a)b"},
    "unknown rule": {"grammar": "start: foo"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_with_a_reason(grammars: grammar.Grammars, name: str):
    started_s = time.thread_time()
    with pytest.raises(RequestError) as caught:
        grammars.compile(StructuredOutputsParams(**HOSTILE[name]))
    assert time.thread_time() - started_s < 0.5, "this process has done the work"
    assert re.match(r"structured_outputs\.(json|regex|grammar) cannot be used: \S", str(caught.value))
    assert len(str(caught.value)) < 400
    grammars.compile(StructuredOutputsParams(regex=f"[a-z]+{len(name)}"))


def test_a_grammar_that_takes_too_long_is_given_up(grammars: grammar.Grammars):
    terminals = " & ".join(f"/.*{i}.*/" for i in range(2000))  # minutes, if it were let
    started_s = time.thread_time()
    with pytest.raises(RequestError, match="it is too large or too complex"):
        grammars.compile(StructuredOutputsParams(grammar=f"start: A\nA: {terminals}"))
    assert time.thread_time() - started_s < 0.5
    grammars.compile(StructuredOutputsParams(regex="[a-z]+again"))


def test_compiled_grammars_are_kept(grammars: grammar.Grammars):
    first = grammars.compile(StructuredOutputsParams(choice=["a", "b"]))
    assert grammars.compile(StructuredOutputsParams(choice=("a", "b"))) is first
    for number in range(grammar._KEPT):
        grammars.compile(StructuredOutputsParams(choice=[f"{number}"]))
    assert grammars.compile(StructuredOutputsParams(choice=["a", "b"])) is not first


def test_who_was_refused_is_refused_again_at_no_cost(grammars: grammar.Grammars):
    costly = StructuredOutputsParams(regex="ab{1000000000}")
    with pytest.raises(RequestError):
        grammars.compile(costly)
    started_s = time.perf_counter()
    with pytest.raises(RequestError, match="too complex"):
        grammars.compile(costly)
    assert time.perf_counter() - started_s < 0.05


def test_what_fails_for_another_reason_is_tried_again(grammars: grammar.Grammars, monkeypatch: pytest.MonkeyPatch):
    def no_process(self: Any, form: str, text: str) -> str:
        raise OSError("no process can be started")

    with monkeypatch.context() as patch:
        patch.setattr(grammar.Trials, "run", no_process)
        with pytest.raises(OSError, match="no process"):
            grammars.compile(StructuredOutputsParams(regex="[a-z]{7}"))
    grammars.compile(StructuredOutputsParams(regex="[a-z]{7}"))


def test_others_need_no_thread_to_wait_for_a_grammar(grammars: grammar.Grammars):
    """A request with a hostile grammar, and after it more with good ones than there are threads."""

    async def ask() -> tuple[Any, float]:
        engine = AsyncEngine.__new__(AsyncEngine)  # `prepare` needs no model
        wanted = [StructuredOutputsParams(regex="ac{1000000000}")]
        wanted += [StructuredOutputsParams(regex=f"[0-9]{{{number}}}") for number in range(1, 50)]
        asked = [asyncio.ensure_future(engine.prepare(grammars.compile, one)) for one in wanted]
        await asyncio.sleep(0.05)
        asked[7].cancel()
        started_s = time.perf_counter()
        await asyncio.to_thread(lambda: None)
        free_s = time.perf_counter() - started_s
        assert not any(one.done() for one in asked[:7])
        return await asyncio.gather(*asked, return_exceptions=True), free_s

    found, free_s = asyncio.run(ask())
    assert isinstance(found[0], RequestError)
    assert isinstance(found[7], asyncio.CancelledError)
    assert all(isinstance(one, grammar.Compiled) for one in found[1:7] + found[8:])
    assert free_s < 0.2, "threads wait"


@pytest.fixture
def slow(grammars: grammar.Grammars, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], threading.Event]:
    """Pretend compilations, one after the other when the event is set; and what was compiled so far."""
    found, go = list[str](), threading.Event()

    def compiled(params: StructuredOutputsParams) -> Any:
        go.wait(10)
        found.append(str(params.regex))
        return params.regex

    monkeypatch.setattr(grammars, "_compile", compiled)
    return found, go


def ask_for(grammars: grammar.Grammars, client: str, regex: str) -> grammar.Compiling:
    with pytest.raises(grammar.Compiling) as caught:
        grammar.without_waiting(grammars.compile, StructuredOutputsParams(regex=regex), client)
    return caught.value


def test_clients_take_turns_and_nobody_can_fill_the_queue(
    grammars: grammar.Grammars, slow: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grammar, "_MOST_OF_CLIENT", 32)
    found, go = slow
    first = ask_for(grammars, "mallory", "m0")
    while grammars._waiting:  # it has begun
        time.sleep(0.001)
    asked = [ask_for(grammars, "mallory", f"m{number}") for number in range(1, 33)]
    with pytest.raises(UnavailableError, match="Try again later"):
        ask_for(grammars, "mallory", "one more")
    asked += [ask_for(grammars, client, f"{client}{number}") for client in ("ada", "bob") for number in range(2)]
    go.set()
    for one in (first, *asked):
        one.done.result(10)
    assert found[:8] == ["m0", "m1", "ada0", "bob0", "m2", "ada1", "bob1", "m3"]


def test_who_waits_for_a_grammar_finds_it_however_many_others_came(grammars: grammar.Grammars, slow: Any):
    found, go = slow
    mine = ask_for(grammars, "ada", "mine")
    others = [ask_for(grammars, f"client {number}", f"n{number}") for number in range(3 * grammar._KEPT)]
    go.set()
    assert mine.done.result(10) == "mine"
    assert grammar.without_waiting(grammars.compile, StructuredOutputsParams(regex="mine")) == "mine"
    for one in others:
        one.done.result(10)
    assert len(found) == len(set(found)) == 1 + len(others)
    ask_for(grammars, "ada", "another").done.result(10)
    grammars.compile(StructuredOutputsParams(regex="another"))
    assert len(grammars._kept) == grammar._KEPT


def test_guides_of_one_grammar_do_not_see_each_other(llm: LLM, grammars: grammar.Grammars):
    compiled = grammars.compile(StructuredOutputsParams(regex="a[xy]|b"))
    one, other = compiled.start(), compiled.start()
    (a,) = llm.tokenizer.encode("a", add_special_tokens=False)
    one.advance(a)
    assert one.mask() != other.mask() == compiled.start().mask()
    assert not one.is_done and not one.error
    (b,) = llm.tokenizer.encode("b", add_special_tokens=False)
    other.advance(b)
    assert other.is_done


def test_a_grammar_too_costly_to_follow_ends_its_own_answer_only(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    plain = SamplingParams(temperature=0.0, max_tokens=20)
    expected = llm.generate(PROMPT, plain)[0].outputs
    monkeypatch.setattr(grammar, "_FREE_S", -1.0)
    costly, other = llm.generate([PROMPT] * 2, [asking(regex="[a-z]{30}"), plain])
    assert costly.outputs[0].finish_reason == "error"
    assert costly.outputs[0].error == "its grammar takes too long to follow; make it simpler"
    assert re.fullmatch("[a-z]+", costly.outputs[0].text)
    assert other.outputs == expected
    assert llm.generate(PROMPT, plain)[0].outputs == expected


def test_without_a_tokenizer_nothing_can_be_followed():
    intake = Intake(None, (2,), lambda request: None, vocab_size=VOCAB)
    with pytest.raises(RequestError, match=r"no tokenizer\.json, so structured_outputs cannot be followed"):
        intake.request([1, 2], asking(regex="a"))


def test_without_an_end_token_nothing_can_be_followed(llm: LLM):
    with pytest.raises(RequestError, match="no end token"):
        grammar.Grammars(llm.tokenizer.as_json, VOCAB, ()).compile(StructuredOutputsParams(regex="a"))


@pytest.mark.parametrize("num_devices", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [3, 32, 41, 85])
def test_each_device_unpacks_its_own_part(num_devices: int, size: int):
    vocab, rng = num_devices * size, np.random.default_rng(size)
    allowed = rng.random((5, vocab)) < 0.5
    padded = np.zeros((5, 32 * mask_words(vocab)), np.bool_)
    padded[:, :vocab] = allowed
    words = np.packbits(padded, axis=1, bitorder="little").view(np.uint32)
    run = lambda words: unpack(words, size)  # noqa: E731
    if num_devices > 1:
        mesh = make_mesh(Parallel(tensor=num_devices))
        specs = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(None, "tensor")}
        run = jax.shard_map(run, mesh=mesh, **specs, check_vma=False)
    np.testing.assert_array_equal(np.asarray(jax.jit(run)(jnp.asarray(words))), allowed)


def test_where_nothing_is_left_the_grammar_alone_counts():
    logits = jnp.asarray([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    wanted = jnp.asarray([[-jnp.inf, -jnp.inf, 5.0], [0.0, -jnp.inf, 0.0]])
    may = jnp.asarray([[False, True, True], [False, True, False]])
    assert np.asarray(obey(logits, wanted, may)).tolist() == [[-np.inf, -np.inf, 5.0], [-np.inf, 2.0, -np.inf]]
