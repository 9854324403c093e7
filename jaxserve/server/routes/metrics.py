"""/metrics: for Prometheus."""

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from jaxserve.server.metrics import CONTENT_TYPE
from jaxserve.server.state import state_of

router = APIRouter()


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Counts of everything, in Prometheus' text form; also while the model is loaded."""
    content = await asyncio.to_thread(state_of(request).metrics.exposed)  # streams must not wait for it
    return Response(content, headers={"content-type": CONTENT_TYPE})
