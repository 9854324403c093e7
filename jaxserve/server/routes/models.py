"""/v1/models: what is served here."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.openai.errors import ApiError
from jaxserve.server.json import JsonResponse
from jaxserve.server.state import ServerState, state_of

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """All names of the model."""
    state = state_of(request)
    return JsonResponse({"object": "list", "data": [_card(state, name) for name in state.model_names]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """One of them."""
    state = state_of(request)
    if name not in state.model_names:
        raise ApiError(f"model {name[:100]!r} is not served here", status=404, code="model_not_found", param="model")
    return JsonResponse(_card(state, name))


def _card(state: ServerState, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.started,
        "owned_by": "jaxserve",
        "root": state.model_names[0],
        "parent": None,
        "max_model_len": None if state.engine is None else state.engine.max_model_len,
    }
