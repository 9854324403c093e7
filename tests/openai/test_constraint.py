"""What a completion's answer must look like reaches the engine, whichever field says so."""

import pytest

from jaxserve import StructuredOutputsParams
from jaxserve.openai.completion import CompletionBody
from jaxserve.openai.errors import ApiError

SCHEMA = {"type": "object"}
ASKED = [
    ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
    ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
    ({"guided_json": SCHEMA}, {"json": SCHEMA}),
    ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
    ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"json": SCHEMA},
    ),
]


@pytest.mark.parametrize(("fields", "wanted"), ASKED, ids=lambda value: next(iter(value)))
def test_every_field_reaches_the_sampling_options(fields, wanted):
    body = CompletionBody.model_validate({"model": "tiny", "prompt": "a", **fields})
    assert body.params().structured_outputs == StructuredOutputsParams(**wanted)


def test_without_any_nothing_is_asked():
    assert CompletionBody.model_validate({"model": "tiny", "prompt": "a"}).params().structured_outputs is None


def test_two_are_one_too_many():
    fields = {"guided_regex": "a", "structured_outputs": {"choice": ["a"]}}
    with pytest.raises(ApiError, match="cannot be obeyed together"):
        CompletionBody.model_validate({"model": "tiny", "prompt": "a", **fields}).params()
