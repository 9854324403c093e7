"""Reading bodies of requests, and describing them in the OpenAPI document."""

import asyncio
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from jaxserve.openai.errors import ApiError, of_validation

T = TypeVar("T", bound=BaseModel)

_LONG = 64 << 10  # bytes; from here on a body is parsed in another thread, so that nobody waits for it
_REFERENCE = "#/components/schemas/{model}"
_documented: dict[str, type[BaseModel]] = {}  # by name


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


def documents(model: type[BaseModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`: bodies are of this model. Routes read them by themselves, and FastAPI cannot know."""
    _documented[model.__name__] = model
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=model.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI) -> None:
    """Make the app's OpenAPI document know the bodies."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            schemas = made.setdefault("components", {}).setdefault("schemas", {})
            for name, model in _documented.items():
                schema = model.model_json_schema(ref_template=_REFERENCE)
                schemas |= schema.pop("$defs", {}) | {name: schema}
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document
