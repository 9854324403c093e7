"""Running the server: the port is open at once, the engine is loaded behind it, and both end together."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn

from jaxserve.async_engine import AsyncEngine
from jaxserve.errors import JaxserveError
from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.logs import logging_to, tell
from jaxserve.server.state import ServerState

_log = logging.getLogger(__name__)


def run_server(config: ServerConfig, model_names: tuple[str, ...], load: Callable[[], AsyncEngine]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
      JaxserveError: the engine could not be loaded.
    """
    failures = list[JaxserveError]()

    @contextlib.asynccontextmanager
    async def lifespan(state: ServerState) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(state))
        try:
            yield
        finally:
            tell(_log, logging.INFO, "shutting down", requests=state.engine.num_unfinished if state.engine else 0)
            await asyncio.wait((loading,))
            if state.engine is not None:
                await asyncio.to_thread(state.engine.close)

    async def _load(state: ServerState) -> None:
        began_s = time.perf_counter()
        try:
            state.serve(await asyncio.to_thread(load))
            tell(_log, logging.INFO, "ready", seconds=round(time.perf_counter() - began_s, 3), **_facts(state))
        except JaxserveError as error:
            failures.append(error)
            server.should_exit = True

    app = create_app(config, model_names, lifespan=lifespan)
    server = uvicorn.Server(uvicorn.Config(app, host=config.host, port=config.port, log_config=None, access_log=False))
    with logging_to(form=config.log_format, level=config.log_level):
        tell(_log, logging.INFO, "starting", model=model_names[0], host=config.host, port=config.port)
        server.run()
        tell(_log, logging.INFO, "stopped")
    if failures:
        raise failures[0]


def _facts(state: ServerState) -> dict[str, Any]:
    """For the log, once the engine is there."""
    assert state.engine is not None
    counts = state.engine.counts()
    names = (
        "backend",
        "architecture",
        "dtype",
        "max_model_len",
        "num_kv_blocks",
        "load_s",
        "warm_up_s",
        "warm_up_compiles",
    )
    return {name: round(counts[name], 3) if name.endswith("_s") else counts[name] for name in names}
