"""Answers in JSON."""

from typing import Any

from starlette.responses import Response

from jaxserve.openai.envelope import dumps


class JsonResponse(Response):
    """Non-ASCII text as it is; no infinities."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """See Response."""
        return dumps(content)
