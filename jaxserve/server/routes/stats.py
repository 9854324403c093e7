"""/stats: what the page shows."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.server.caller import caller_of
from jaxserve.server.json import JsonResponse
from jaxserve.server.state import state_of

router = APIRouter()


@router.get("/stats")
async def stats(request: Request) -> Response:
    """Figures of now, and the last requests: all of them, or the caller's own where keys stand for clients."""
    state = state_of(request)
    figures = state.stats.read(state.ready_engine.counts(), caller_of(request).client or None)
    return JsonResponse(figures, headers={"cache-control": "no-store"})
