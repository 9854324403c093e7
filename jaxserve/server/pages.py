"""Lists that are told page by page, as OpenAI's API does."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request

from jaxserve.openai.errors import ApiError

T = TypeVar("T")


def page(request: Request, items: Sequence[T], body: Callable[[T], dict[str, Any]], *, most: int, limit: int) -> Any:
    """The part of `items` (oldest first) that a request asks for by `after`, `limit` and `order`: newest first by default.

    `most` and `limit`: the largest limit, and the one of who gives none.

    Raises:
      ApiError: a parameter that cannot be meant.
    """
    query = request.query_params
    text, order, after = query.get("limit", str(limit)), query.get("order", "desc"), query.get("after")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise ApiError(f"limit must be a whole number from 1 to {most}", param="limit")
    if order not in ("asc", "desc"):
        raise ApiError("order must be 'asc' or 'desc'", param="order")
    bodies = [body(item) for item in (items if order == "asc" else reversed(items))]
    if after is not None:
        places = [place for place, each in enumerate(bodies) if each["id"] == after]
        if not places:
            raise ApiError(f"there is nothing called {after[:60]!r} to go on from", status=404, param="after")
        bodies = bodies[places[0] + 1 :]
    shown = bodies[: int(text)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(shown) < len(bodies),
    }


def parameters(*names: str) -> dict[str, Any]:
    """For a route's `openapi_extra`: the query parameters that it reads by itself."""
    return {"parameters": [{"name": name, "in": "query", "schema": _SCHEMAS[name]} for name in names]}


_SCHEMAS: dict[str, dict[str, Any]] = {
    "after": {"type": "string"},
    "limit": {"type": "integer", "minimum": 1},
    "order": {"type": "string", "enum": ["asc", "desc"]},
    "purpose": {"type": "string"},
}
