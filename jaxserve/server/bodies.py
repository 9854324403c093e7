"""Reading bodies of requests, and saying what they are."""

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from jaxserve.openai.errors import ApiError, of_validation

T = TypeVar("T", bound=BaseModel)

_LONG = 64 << 10  # bytes; from here on a body is parsed in another thread, so that nobody waits for it
REFERENCE = "#/components/schemas/{model}"
documented: dict[str, type[BaseModel]] = {}  # by name; for the OpenAPI document


async def read_body(request: Request, model: type[T]) -> T:
    """The body of a request.

    Raises:
      ApiError: it is not what the model says.
    """
    raw = await request.body()
    try:
        if len(raw) < _LONG:
            return model.model_validate_json(raw)
        return await asyncio.to_thread(model.model_validate_json, raw)
    except ValidationError as error:
        raise of_validation(error) from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or half of a surrogate pair
        raise ApiError(f"the body cannot be read: {error!s:.100}", code="invalid_json") from None


def documents(model: type[BaseModel], answer: dict[str, Any] | None = None, *, streams: bool = False) -> dict[str, Any]:
    """For a route's `openapi_extra`: what it reads and writes by itself, so that FastAPI cannot know. `answer`: a JSON
    schema; see `answers`. `streams`: whether it may also come as server-sent events."""
    documented[model.__name__] = model
    body = {"application/json": {"schema": {"$ref": REFERENCE.format(model=model.__name__)}}}
    content: dict[str, Any] = {"application/json": {"schema": answer or {"type": "object"}}}
    if streams:
        event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}  # of each of them
        content["text/event-stream"] = {"schema": event}
    return {
        "requestBody": {"required": True, "content": body},
        "responses": {"200": {"description": "The answer", "content": content}},
    }


def answers(kind: str, *names: str) -> dict[str, Any]:
    """JSON schema of an object of this `object` kind ("": it names none) that has at least these fields."""
    known: dict[str, Any] = {"object": {"const": kind}} if kind else {}
    return {"type": "object", "required": [*known, *names], "properties": known}
