"""Every check of sampling options and requests: what is refused, and that the message names the value."""

import dataclasses
import inspect
import math
import re

import pytest

from jaxserve.errors import ConfigError, JaxserveError, RequestError
from jaxserve.request import MAX_LOGPROBS, Request, SamplingParams, Task, check_tokens

NAN, INF, HUGE = math.nan, math.inf, 10**400

REFUSED = [
    ("temperature", -0.1, "temperature=-0.1 must be a finite number of at least 0"),
    ("temperature", NAN, "temperature=nan"),
    ("temperature", INF, "temperature=inf"),
    ("temperature", HUGE, "temperature=about 2**1329"),
    ("temperature", True, "temperature=True"),
    ("temperature", "0.5", "temperature='0.5'"),
    ("temperature", None, "temperature=None"),
    ("top_p", 0.0, "top_p=0.0 must be a finite number from 0 to 1 and above 0"),
    ("top_p", 1.01, "top_p=1.01"),
    ("top_p", NAN, "top_p=nan"),
    ("min_p", -0.1, "min_p=-0.1"),
    ("min_p", 2, "min_p=2"),
    ("presence_penalty", 2.1, "presence_penalty=2.1 must be a finite number from -2 to 2"),
    ("frequency_penalty", -3, "frequency_penalty=-3"),
    ("repetition_penalty", 0, "repetition_penalty=0"),
    ("repetition_penalty", INF, "repetition_penalty=inf"),
    ("n", 0, "n=0 must be a whole number of at least 1"),
    ("n", True, "n=True"),
    ("n", 2.0, "n=2.0"),
    ("n", 1025, "n=1025 must be at most 1024"),
    ("n", 1 << 63, f"n={1 << 63}"),
    ("top_k", -2, "top_k=-2"),
    ("top_k", 1.5, "top_k=1.5"),
    ("max_tokens", 0, "max_tokens=0"),
    ("max_tokens", HUGE, "max_tokens=about 2**1329"),
    ("max_tokens", True, "max_tokens=True"),
    ("min_tokens", -1, "min_tokens=-1"),
    ("min_tokens", 17, "min_tokens=17 is above max_tokens=16"),
    ("seed", 1.0, "seed=1.0"),
    ("seed", 1 << 63, f"seed={1 << 63}"),
    ("logprobs", -1, "logprobs=-1"),
    ("logprobs", True, "logprobs=True"),
    ("logprobs", MAX_LOGPROBS + 1, f"logprobs={MAX_LOGPROBS + 1} must be at most {MAX_LOGPROBS}"),
    ("prompt_logprobs", 1000, "prompt_logprobs=1000"),
    ("stop", "", "stop must hold non-empty strings"),
    ("stop", ["a", ""], "stop must hold non-empty strings"),
    ("stop", [1], "stop must hold non-empty strings, not [1]"),
    ("stop", 5, "stop must hold non-empty strings, not 5"),
    ("stop", ["a" * 4000, "b" * 97], "stop holds 4097 characters; at most 4096 are supported"),
    ("stop", b"ab", "stop must hold non-empty strings"),
    ("bad_words", [None], "bad_words must hold non-empty strings"),
    ("stop_token_ids", "12", "stop_token_ids must hold token ids"),
    ("stop_token_ids", 12, "stop_token_ids must hold token ids, not 12"),
    ("stop_token_ids", [-1], "stop_token_ids must hold token ids, not [-1]"),
    ("stop_token_ids", [True], "stop_token_ids must hold token ids"),
    ("stop_token_ids", [1.0], "stop_token_ids must hold token ids"),
    ("allowed_token_ids", [], "allowed_token_ids is empty"),
    ("allowed_token_ids", b"ab", "allowed_token_ids must hold token ids"),
    ("logit_bias", {1: NAN}, "logit_bias must map token ids to finite numbers"),
    ("logit_bias", {1: INF}, "logit_bias must map token ids to finite numbers"),
    ("logit_bias", {1: HUGE}, "logit_bias must map token ids to numbers"),
    ("logit_bias", {-1: 1.0}, "logit_bias must map token ids to finite numbers"),
    ("logit_bias", {1.5: 1.0}, "logit_bias must map token ids to numbers"),
    ("logit_bias", {"x": 1.0}, "logit_bias must map token ids to numbers"),
    ("logit_bias", [1], "logit_bias must map token ids to numbers"),
    ("logit_bias", {1: None}, "logit_bias must map token ids to numbers"),
    ("ignore_eos", "false", "ignore_eos='false' must be True or False"),
    ("skip_special_tokens", 0, "skip_special_tokens=0"),
    ("include_stop_str_in_output", None, "include_stop_str_in_output=None"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED, ids=lambda v: f"{v!s:.20}")
def test_a_wrong_option_is_refused_with_its_name_and_value(name, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 250


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1.0, 1.0, 0, 16)
    assert not params.has_edits


def test_edges_of_the_ranges_are_accepted():
    SamplingParams(
        temperature=0, top_p=1, min_p=1, top_k=-1, n=1024, max_tokens=None, min_tokens=10**9, seed=-(1 << 63)
    )
    SamplingParams(presence_penalty=-2, frequency_penalty=2, repetition_penalty=1e-3, logprobs=0, prompt_logprobs=20)


def test_lists_become_tuples_whatever_they_came_in():
    params = SamplingParams(stop="end", bad_words=iter(["a"]), stop_token_ids=iter([1, 2]), allowed_token_ids={5})
    assert (params.stop, params.bad_words) == (("end",), ("a",))
    assert (params.stop_token_ids, params.allowed_token_ids) == ((1, 2), (5,))
    assert SamplingParams(logit_bias={"15": 1}).logit_bias == {15: 1.0}
    assert SamplingParams(logit_bias={}).logit_bias is None


@pytest.mark.parametrize(
    "options",
    [{"presence_penalty": 1}, {"frequency_penalty": -1}, {"repetition_penalty": 1.1}, {"logit_bias": {1: 1}}]
    + [{"allowed_token_ids": [1]}],
)
def test_penalties_bias_and_allowed_ids_are_edits(options):
    assert SamplingParams(**options).has_edits


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("top-p", "top_p"), ("stops", "stop")],
)
def test_a_misspelt_option_suggests_the_right_name(wrong, right):
    for misspell in (lambda: SamplingParams(**{wrong: 1}), lambda: dataclasses.replace(SamplingParams(), **{wrong: 1})):
        with pytest.raises(ConfigError) as caught:
            misspell()
        assert str(caught.value) == f"unknown SamplingParams option '{wrong}'. Did you mean '{right}'?"


def test_notebooks_see_every_option_in_the_signature():
    fields = dataclasses.fields(SamplingParams)
    shown = inspect.signature(SamplingParams).parameters
    assert {name: option.default for name, option in shown.items()} == {f.name: f.default for f in fields}
    assert SamplingParams.__doc__.startswith("How to choose tokens")


def test_options_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 2.0


def check(ids, **options) -> None:
    names = {field.name for field in dataclasses.fields(Request)}
    fields = {name: options.pop(name) for name in list(options) if name in names}
    request = Request(request_id="r", prompt_token_ids=tuple(ids), params=SamplingParams(**options), **fields)
    check_tokens(request, vocab_size=10, max_model_len=8)


def test_a_prompt_must_leave_room_for_one_token():
    check([1] * 7)
    with pytest.raises(RequestError, match="the prompt has 8 tokens, and max_model_len=8"):
        check([1] * 8)


@pytest.mark.parametrize("task", [Task.SCORE, Task.EMBED])
def test_a_prompt_without_answer_may_fill_the_context(task):
    check([1] * 8, task=task)
    with pytest.raises(RequestError, match="9 tokens"):
        check([1] * 9, task=task)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([10], {}, "token id 10 is outside the vocabulary of 10"),
        ([3, -2], {}, "token id -2"),
        ([1], {"stop_token_ids": [2, 77]}, "token id 77"),
        ([1], {"allowed_token_ids": [10]}, "token id 10"),
        ([1], {"logit_bias": {11: 1}}, "token id 11"),
        ([1], {"bad_word_ids": ((1,),) * 60, "eos_token_ids": (1,) * 5}, "65 stop tokens and bad words together"),
        ([1], {"bad_word_ids": ((1,), ())}, "a bad word has no tokens"),
        ([1], {"priority": "high"}, "priority='high' must be a number"),
        ([1], {"priority": NAN}, "priority=nan must be a number"),
        ([1], {"client": 3}, "client=3 must be a text"),
        ([1], {"program": None}, "program=None must be a text"),
        ([1], {"parents": "a"}, "parents='a' must be a list"),
        ([1], {"parents": (1,)}, r"parents=\(1,\) must be a list"),
        ([1], {"deadline_s": -1.0}, "deadline_s=-1.0 must be a number of seconds"),
        ([1], {"deadline_s": NAN}, "deadline_s=nan must be a number of seconds"),
        ([1], {"deadline_s": True}, "deadline_s=True must be a number of seconds"),
        ([1], {"pin": "a", "pin_tokens": 1.5}, "pin_tokens=1.5 must be a whole number"),
        ([1], {"pin": "a", "pin_tokens": 2}, "pin_tokens=2 needs a name"),
        ([1, 1], {"pin_tokens": 1}, "pin_tokens=1 needs a name"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused(ids, options, message):
    with pytest.raises(RequestError, match=message):
        check(ids, **options)


def test_callers_can_catch_value_error():
    assert issubclass(JaxserveError, ValueError)
    error = ConfigError("this is wrong", remedy="Do that")
    assert str(error) == "this is wrong. Do that."
    assert error.remedy == "Do that"
