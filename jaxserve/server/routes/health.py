"""Whether the server lives (/health), takes requests (/ready), and how loaded it is (/load)."""

from fastapi import APIRouter, Request
from starlette.responses import Response

import jaxserve
from jaxserve.openai.errors import ApiError
from jaxserve.server.gate import CLOSING
from jaxserve.server.json import JsonResponse
from jaxserve.server.state import state_of

router = APIRouter()


@router.get("/health", response_class=Response)
async def health(request: Request) -> Response:
    """200 as long as restarting would not help: also while the model is loaded."""
    engine = state_of(request).engine
    if engine is not None and engine.has_failed:
        raise ApiError(engine.failure, status=503, code="engine_failed")
    return Response()


@router.get("/ready", response_class=Response)
async def ready(request: Request) -> Response:
    """200 when requests are taken."""
    state = state_of(request)
    engine = state.ready_engine
    if state.is_closing:
        raise ApiError(CLOSING, status=503, code="unavailable")
    if engine.failure:
        raise ApiError(engine.failure, status=503, code="unavailable")
    return Response()


@router.get("/version")
async def version() -> Response:
    """Ours."""
    return JsonResponse({"version": jaxserve.__version__})


@router.get("/load")
async def load(request: Request) -> Response:
    """Unfinished requests, as vLLM tells it."""
    engine = state_of(request).engine
    return JsonResponse({"server_load": 0 if engine is None else engine.num_unfinished})
