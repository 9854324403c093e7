"""Lines of a batch file, understood: what to compute for each, and how to tell the answer."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from jaxserve.batch.endpoints import ENDPOINTS, Model, Work
from jaxserve.batch.lines import Line, kind
from jaxserve.intake import Prompt
from jaxserve.openai.errors import ApiError, of_validation
from jaxserve.openai.names import served_name

_FIELDS = ("custom_id", "method", "url", "body")


class Pin(NamedTuple):
    """The group of prompts that a prompt begins like."""

    name: str
    num_tokens: int  # that they share
    num_members: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One request line, understood. `prompts` and `pins` once it has been planned."""

    custom_id: str
    model: str
    work: Work
    meta: Mapping[str, Any]  # for the scheduler: fields of `Request`
    prompts: Sequence[Prompt] = ()
    pins: Sequence[Pin | None] = ()  # of each prompt


Item = tuple[int, str | None, Job | ApiError]  # line number, custom_id, what to do or what is wrong


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """What lines are read for."""

    model: Model
    endpoints: Collection[str] = tuple(ENDPOINTS)
    own: Callable[[dict[str, Any]], dict[str, Any]] = dict  # what becomes of a line's fields for the scheduler


def jobs(lines: Iterable[Line], reader: Reader) -> Iterator[Item]:
    """Lines, understood, or with what is wrong with them."""
    for number, key, content in lines:
        if isinstance(content, ApiError):
            yield number, None, content
            continue
        try:
            yield number, str(key), parse_job(content, reader)
        except ApiError as error:
            yield number, str(key), error


def parse_job(raw: Mapping[str, Any], reader: Reader) -> Job:
    """Understand a line.

    Raises:
      ApiError: with the field at fault.
    """
    check_frame(raw, reader.endpoints)
    try:
        name, work, meta = ENDPOINTS[raw["url"]](raw["body"], reader.model)
    except ValidationError as error:
        raise of_validation(error) from None
    model = served_name(name, reader.model.names)
    return Job(custom_id=raw["custom_id"], model=model, work=work, meta=reader.own(meta))


def check_frame(raw: Mapping[str, Any], endpoints: Collection[str]) -> None:
    """Check everything but the body.

    Raises:
      ApiError: with the field at fault.
    """
    unknown = [key for key in raw if key not in _FIELDS]
    if unknown:
        name = unknown[0][:60]
        raise ApiError(f"unknown field {name!r} beside {', '.join(_FIELDS)}", code="unknown_field", param=name)
    if raw.get("method", "POST") != "POST":
        raise ApiError(f"method must be 'POST', not {raw['method']!r:.40}", param="method")
    url, body = raw.get("url"), raw.get("body")
    if not isinstance(url, str) or url not in endpoints:
        known = ", ".join(endpoints)
        raise ApiError(f"url {url!r:.60} is not one of {known}", code="invalid_url", param="url", status=404)
    if not isinstance(body, dict):
        raise ApiError(f"body must be a JSON object, not {kind(body)}", param="body")
