"""Whatever comes, no answer is a fault of the server, and each is what the OpenAPI document says (schemathesis)."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SETTINGS = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
SOME = {
    "n": 2,
    "max_tokens": 8,
    "max_completion_tokens": 8,
    "max_output_tokens": 16,
}  # at most, or a test takes minutes


def _small(context, body):
    """Bodies as they come, but for the work that they ask for."""
    if isinstance(body, dict):
        if isinstance(body.get("model"), str):
            body["model"] = "tiny"  # or hardly anything would come further than that
        for name, most in SOME.items():
            if isinstance(body.get(name), int) and body[name] > most:
                body[name] = most
        if "messages" in body or "input" in body:
            body.setdefault("max_tokens" if "messages" in body else "max_output_tokens", 16)
    return body


DOCUMENT = schemathesis.openapi.from_dict(create_app(ServerConfig(), ("tiny",)).openapi())
DOCUMENT.hook("map_body")(_small)
OPERATIONS = {found.ok().label: found.ok() for found in DOCUMENT.get_all_operations()}


def fuzz(operation, url: str, num_examples: int) -> None:
    """Bodies as the document wants them, and others."""
    modes = GenerationMode if operation.body else [GenerationMode.POSITIVE]
    ways = [operation.as_strategy(generation_mode=mode) for mode in modes]

    @given(st.one_of(ways))
    @settings(max_examples=num_examples, **SETTINGS)
    def check(case):
        case.call_and_validate(base_url=url, checks=CHECKS)

    check()


@pytest.mark.parametrize("label", OPERATIONS)
def test_nothing_that_is_sent_is_the_servers_fault(server, label):
    fuzz(OPERATIONS[label], server.url, 12)


@pytest.mark.slow
@pytest.mark.parametrize("label", OPERATIONS)
def test_nothing_that_is_sent_is_the_servers_fault_for_long(server, label):
    fuzz(OPERATIONS[label], server.url, 60)


def test_the_document_knows_bodies_and_errors():
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/tokenize"):
        assert OPERATIONS[f"POST {path}"].body
    for operation in OPERATIONS.values():
        assert {"200", "401", "503"} <= set(operation.definition.raw["responses"])
