"""Running the server: the port is open at once, the engine is loaded behind it, and both end together."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable

import uvicorn

from jaxserve.async_engine import AsyncEngine
from jaxserve.errors import JaxserveError, UnavailableError
from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.state import ServerState


def run_server(config: ServerConfig, model_names: tuple[str, ...], load: Callable[[], AsyncEngine]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
      JaxserveError: the engine could not be loaded, or another server has the folder of files.
    """
    failures = list[JaxserveError]()

    @contextlib.asynccontextmanager
    async def lifespan(state: ServerState) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(state))
        try:
            yield
        finally:
            await asyncio.wait((loading,))
            if state.engine is not None:
                await asyncio.to_thread(state.engine.close)

    async def _load(state: ServerState) -> None:
        try:
            state.serve(await asyncio.to_thread(load))
        except JaxserveError as error:
            failures.append(error)
            server.should_exit = True

    app = create_app(config, model_names, lifespan=lifespan)
    try:
        app.state.archive.claim()
    except UnavailableError as error:
        if config.files_dir is not None:
            raise
        print(f"jaxserve: no files and batches here: {error}", file=sys.stderr)  # noqa: T201  for whoever has started it
    server = uvicorn.Server(
        uvicorn.Config(app, host=config.host, port=config.port, log_level="warning", access_log=False)
    )
    server.run()
    if failures:
        raise failures[0]
