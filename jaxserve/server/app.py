"""The server as an ASGI app."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response

import jaxserve
from jaxserve.async_engine import AsyncEngine
from jaxserve.errors import JaxserveError
from jaxserve.openai.errors import ApiError, api_error
from jaxserve.server.access import GONE, Access
from jaxserve.server.archive import Archive
from jaxserve.server.config import ServerConfig
from jaxserve.server.document import describe
from jaxserve.server.guards import guards
from jaxserve.server.json import error_response
from jaxserve.server.routes import (
    batches,
    chat,
    completions,
    embeddings,
    files,
    health,
    metrics,
    models,
    page,
    responses,
    stats,
    tokens,
)
from jaxserve.server.state import ServerState
from jaxserve.server.traces import Traces

ROUTERS = (
    health.router,
    metrics.router,
    models.router,
    completions.router,
    chat.router,
    embeddings.router,
    tokens.router,
    responses.router,
    files.router,
    batches.router,
    stats.router,
    page.router,
)


def create_app(
    config: ServerConfig,
    model_names: tuple[str, ...],
    engine: AsyncEngine | None = None,
    lifespan: Callable[[ServerState], contextlib.AbstractAsyncContextManager[None]] | None = None,
) -> FastAPI:
    """`engine` may come later (`app.state.server.serve(engine)`): until then requests get status 503.

    Raises:
      ConfigError: keys that cannot be read, or an option that wants a package that is not installed.
    """
    endpoint = config.otlp_traces_endpoint
    traces = None if endpoint is None else Traces(endpoint, model_names[0])

    @contextlib.asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            if traces is not None:
                stack.push_async_callback(asyncio.to_thread, traces.close)
            stack.callback(state.release)
            await stack.enter_async_context(state.traffic.watching())
            if lifespan is not None:
                await stack.enter_async_context(lifespan(state))
            await stack.enter_async_context(app.state.archive.living())
            yield

    state = ServerState(config, model_names)
    app = FastAPI(
        title="jaxserve",
        version=jaxserve.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=living,
        # Access is the outermost: it sees what all the others answer.
        middleware=[
            Middleware(Access, traffic=state.traffic, logs=config.log_requests, traces=traces),
            *guards(config, state.quotas),
        ],
    )
    app.state.server = state
    if engine is not None:
        state.serve(engine)
    app.state.archive = Archive(state)
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ApiError, _tell_api_error)
    app.add_exception_handler(JaxserveError, _tell_ours)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(ClientDisconnect, _tell_nobody)
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
    return Response(status_code=GONE)
