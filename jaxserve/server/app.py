"""The server as an ASGI app."""

import contextlib
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

import jaxserve
from jaxserve.async_engine import AsyncEngine
from jaxserve.errors import JaxserveError
from jaxserve.openai.errors import ApiError, api_error
from jaxserve.server.bodies import describe
from jaxserve.server.config import ServerConfig
from jaxserve.server.guards import guards
from jaxserve.server.json import error_response
from jaxserve.server.routes import (
    chat,
    completions,
    embeddings,
    health,
    models,
    page,
    stats,
    tokens,
)
from jaxserve.server.state import ServerState

ROUTERS = (
    health.router,
    models.router,
    completions.router,
    chat.router,
    embeddings.router,
    tokens.router,
    stats.router,
    page.router,
)
_GONE = 499  # nginx's number for a caller who did not wait


def create_app(
    config: ServerConfig,
    model_names: tuple[str, ...],
    engine: AsyncEngine | None = None,
    lifespan: Callable[[ServerState], contextlib.AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """`engine` may come later (`app.state.server.serve(engine)`): until then requests get status 503.

    Raises:
      ConfigError: keys that cannot be read.
    """

    @contextlib.asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with contextlib.nullcontext() if lifespan is None else lifespan(state):
                yield
        finally:
            state.release()

    state = ServerState(config, model_names)
    app = FastAPI(
        title="jaxserve",
        version=jaxserve.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=living,
        middleware=guards(config, state.quotas),
    )
    app.state.server = state
    if engine is not None:
        state.serve(engine)
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ApiError, _tell_api_error)
    app.add_exception_handler(JaxserveError, _tell_ours)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(ClientDisconnect, _tell_nobody)
    app.add_exception_handler(Exception, _tell_unknown)
    describe(app)
    return app


async def _tell_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _tell_ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, JaxserveError)
    return await _tell_api_error(request, api_error(error))


async def _tell_http(request: Request, error: Exception) -> Response:
    """What the router says by itself: no such path, no such method."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    reasons = {404: f"there is no {path!r} here", 405: f"{path!r} does not know method {request.method}"}
    told = ApiError(reasons.get(error.status_code, str(error.detail)), status=error.status_code)
    response = error_response(told)
    response.headers.update(error.headers or {})
    return response


async def _tell_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=_GONE)


async def _tell_unknown(request: Request, error: Exception) -> Response:
    """A bug of ours. What went wrong is in the log, not in the answer."""
    told = ApiError("something went wrong in the server; its log says what", status=500, code="internal_error")
    return error_response(told)
