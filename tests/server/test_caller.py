"""What headers say to the scheduler: the same as fields of the body, or a refusal that names the header."""

import pytest
from starlette.requests import Request

from jaxserve.openai.errors import ApiError
from jaxserve.server.caller import headers_meta


def meta(**headers):
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return headers_meta(Request({"type": "http", "headers": pairs}))


def test_headers_say_what_fields_of_the_body_say():
    found = meta(x_program="p", x_parents="a, b,", x_priority="-1.5", x_deadline_ms="250", x_client="ada", x_stage="s")
    wanted = {"client": "ada", "program": "p", "stage": "s", "priority": -1.5, "deadline_s": 0.25}
    assert found == wanted | {"parents": ("a", "b")}
    assert meta() == {}


@pytest.mark.parametrize("value", ["soon", "nan", "inf", "-inf", ""])
@pytest.mark.parametrize("name", ["priority", "deadline_ms"])
def test_what_is_no_number_is_refused_with_its_header(name, value):
    with pytest.raises(ApiError, match=f"header x-{name.replace('_', '-')}.* number") as caught:
        meta(**{f"x_{name}": value})
    assert (caught.value.status, caught.value.param) == (400, name)


def test_a_deadline_that_is_over_is_refused():
    with pytest.raises(ApiError, match="header x-deadline-ms: input should be greater than 0"):
        meta(x_deadline_ms="0")
