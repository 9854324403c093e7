"""Answers in JSON."""

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from jaxserve.openai.envelope import dumps, dumps_in_pieces
from jaxserve.openai.errors import ApiError


class JsonResponse(Response):
    """Non-ASCII text as it is; no infinities."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """See Response."""
        return dumps(content)


class LongJsonResponse(JsonResponse):
    """The same, made without holding up other threads."""

    def render(self, content: Any) -> bytes:
        """See Response."""
        return dumps_in_pieces(content)


def error_response(error: ApiError, *, wait_s: float = 1.0, headers: Mapping[str, str] | None = None) -> JsonResponse:
    """OpenAI's error object. Who may try again is told after how many seconds."""
    response = JsonResponse(error.body(), status_code=error.status, headers=headers)
    if error.status in (429, 503):
        response.headers["retry-after"] = str(max(1, math.ceil(wait_s)))
    return response
