"""/metrics: for Prometheus."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.server.state import state_of

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counts of everything, in Prometheus' text form; also while the model is loaded."""
    content, content_type = state_of(request).metrics.exposed(request.headers.get("accept", ""))
    return Response(content, headers={"content-type": content_type})
