"""/metrics: for Prometheus."""

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.server.state import state_of

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counts of everything, in Prometheus' text form; also while the model is loaded."""
    exposed = state_of(request).metrics.exposed
    # Some milliseconds, mostly in prometheus_client: streams must not wait for them.
    content, content_type = await asyncio.to_thread(exposed, request.headers.get("accept", ""))
    return Response(content, headers={"content-type": content_type})
