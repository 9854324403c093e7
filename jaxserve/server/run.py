"""Running the server: the port is open at once, the engine is loaded behind it, and both end together."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from jaxserve.async_engine import AsyncEngine
from jaxserve.errors import UnavailableError
from jaxserve.open_files import raise_limit
from jaxserve.server.app import create_app
from jaxserve.server.archive import Archive
from jaxserve.server.config import ServerConfig
from jaxserve.server.door import Hosts
from jaxserve.server.listen import is_private, listen, tls, url
from jaxserve.server.logs import logging_to, tell
from jaxserve.server.protocol import protocol
from jaxserve.server.state import ServerState
from jaxserve.server.turnstile import Turnstile

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAST_WORDS_S = 5.0  # for answers that are complete, or cut short, to reach their callers
# Of garbage: after so many new objects, so many collections of these, so many of those. The last kind looks through all that
# requests hold, 20 ms with 256 of them, so it is ten times as rare as Python's own; at most 1,000,000 objects wait for it.
# Were the others rarer, they would take longer: 5 to 17 ms instead of 4 to 8.
_COLLECTIONS = (1000, 10, 100)
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells expect


def run_server(config: ServerConfig, model_names: tuple[str, ...], load: Callable[[], AsyncEngine]) -> None:
    """Serve until SIGTERM or Ctrl-C: then requests under way get `drain_timeout` to end. A second one ends it at once.

    Raises:
      ConfigError: it cannot listen there, or has no use of the certificates or keys.
      UnavailableError: another server has the folder of files.
      Exception: of `load`.
    """
    with logging_to(form=config.log_format, level=config.log_level) as settle:
        _run(config, model_names, _Run(config, load, settle))


def _run(config: ServerConfig, model_names: tuple[str, ...], run: "_Run") -> None:
    app = create_app(config, model_names, lifespan=run.lifespan)
    run.archive = app.state.archive
    context = tls(config)
    raise_limit()
    with listen(config) as listening:
        _claim(run.archive, config)
        _listen_with(app, config, run, context, listening)
    if run.failure is not None:
        raise run.failure


def _claim(archive: Archive, config: ServerConfig) -> None:
    """Have the folder of files for this process, or do without."""
    try:
        archive.claim()
    except UnavailableError as error:
        if config.files_dir is not None:
            raise
        _log.warning("no files and batches here: %s", error)


def _listen_with(
    app: ASGIApp, config: ServerConfig, run: "_Run", context: ssl.SSLContext | None, listening: socket.socket
) -> None:
    if is_private(listening) and not config.has_keys:
        app = Hosts(app, (config.host, *config.allowed_host))
    if not is_private(listening) and not config.has_keys:
        _log.warning("whoever reaches %s may use it; --api-key asks for a key", url(config, listening))
    run.where = url(config, listening)
    run.server = _Server(
        uvicorn.Config(
            Turnstile(app),
            http=protocol(config),  # pyright: ignore[reportArgumentType]  it is only called
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nobody may say where he comes from
            headers=[("x-content-type-options", "nosniff")],
            root_path=config.root_path,
            timeout_keep_alive=config.keep_alive_timeout,  # pyright: ignore[reportArgumentType]  any number of seconds
            timeout_graceful_shutdown=LAST_WORDS_S,  # pyright: ignore[reportArgumentType]
            ssl_context_factory=None if context is None else lambda *_: context,
        ),
        run.stop,
    )
    run.server.run(sockets=[listening])


class _Run:
    """From the first signal of life to the last."""

    def __init__(self, config: ServerConfig, load: Callable[[], AsyncEngine], settle: Callable[[], None]):
        """`settle`: write what is logged."""
        self.failure: BaseException | None = None
        self.where = ""
        self.server: uvicorn.Server
        self.archive: Archive
        self._config = config
        self._load = load
        self._settle = settle
        self._state: ServerState | None = None  # until the loop runs
        self._loop: asyncio.AbstractEventLoop
        self._draining: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, state: ServerState) -> AsyncIterator[None]:
        """The engine is loaded while the server answers, that it is not ready yet, and is closed after all else."""
        self._state, self._loop = state, asyncio.get_running_loop()
        # Not one of asyncio's threads: the process could not end before it does.
        threading.Thread(target=self._load_engine, name="jaxserve-load", daemon=True).start()
        _log.info("loading; listening on %s", self.where)
        try:
            yield
        finally:
            if state.engine is not None:
                await asyncio.to_thread(state.engine.close)
            _log.info("stopped")

    def stop(self, number: int, frame: FrameType | None) -> None:
        """On a signal."""
        if self._draining is not None:  # again: whoever asks twice does not want to wait
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif self._state is None or self._state.engine is None:
            _log.info("stopped while loading")
            self._settle()
            sys.stdout.flush()
            # Loading cannot be interrupted, and an interpreter that ends beside it may crash.
            os._exit(_EXIT_INTERRUPTED if number == signal.SIGINT else 0)
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _load_engine(self) -> None:
        try:
            engine = self._load()
        except BaseException as failure:  # noqa: BLE001  it is raised by `run_server`
            self.failure = failure
            self.server.should_exit = True
        else:
            # What was loaded stays. A collection of garbage that looked through all of it stopped every thread for 0.3 s.
            gc.collect()
            gc.freeze()
            gc.set_threshold(*_COLLECTIONS)
            self._loop.call_soon_threadsafe(self._serve, engine)

    def _serve(self, engine: AsyncEngine) -> None:
        assert self._state is not None
        try:
            self._state.serve(engine)
        except Exception as failure:  # noqa: BLE001  it is raised by `run_server`
            self.failure, self.server.should_exit = failure, True
            return
        tell(_log, logging.INFO, f"ready on {self.where}", **_facts(engine))

    def _begin_drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        assert self._state is not None and self._state.engine is not None
        engine, limit = self._state.engine, self._config.drain_timeout
        self._state.is_closing = True  # from now on requests get 503 and so does /ready; /health goes on
        tell(_log, logging.INFO, "shutting down", requests=engine.num_unfinished, timeout_s=limit)
        try:
            await self.archive.pause()  # the next server goes on with its batches
            await asyncio.wait_for(engine.drain(), limit)
        except TimeoutError:
            tell(_log, logging.WARNING, "requests are cut short", requests=engine.num_unfinished)
            await asyncio.to_thread(engine.close)  # their callers are told so
        finally:
            self.server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn ends the process by the signal that it got; ours ends well."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[int, FrameType | None], None]):
        super().__init__(config)
        self._stop = stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Ours, for as long as it runs."""
        before = {number: signal.signal(number, self._stop) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _facts(engine: AsyncEngine) -> dict[str, Any]:
    """For the log, once the engine is there."""
    counts = engine.counts()
    sizes = ("backend", "architecture", "dtype", "max_model_len", "num_kv_blocks", "warm_up_compiles")
    times = ("load_s", "warm_up_s")
    return {name: counts[name] for name in sizes} | {name: round(counts[name], 3) for name in times}
