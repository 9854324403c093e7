"""A real server in this process, on a free port of this machine, with the bundled model."""

import asyncio
import contextlib
import dataclasses
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from jaxserve.async_engine import AsyncEngine
from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig


@dataclasses.dataclass(frozen=True)
class Server:
    """A running one. Its `engine` is shared by all tests of a worker: leave it idle."""

    app: FastAPI
    url: str

    @property
    def engine(self) -> AsyncEngine:
        return self.app.state.server.engine


@contextlib.contextmanager
def serving(app: FastAPI, **options: Any) -> Iterator[Server]:
    """Run an app in a thread. `options` are uvicorn's."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False, **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server has not started"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Server(app, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def engine() -> Iterator[AsyncEngine]:
    """The bundled model. One for all servers of a worker: it takes seconds to load."""
    made = AsyncEngine("tiny", max_num_seqs=8, max_requests=64, progress=False)
    yield made
    made.close()


@pytest.fixture(scope="session")
def run() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Runs coroutines on an event loop of the tests' own, beside that of the server."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="session")
def server(engine: AsyncEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with default options, but for its files: the user's own are none of a test's business."""
    config = ServerConfig(files_dir=str(tmp_path_factory.mktemp("archive")))
    with serving(create_app(config, ("tiny",), engine)) as running:
        yield running


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """A certificate of its own and its key, and another key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl here")
    folder = tmp_path_factory.mktemp("tls")
    for name in ("one", "two"):
        asked = f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout {name}.key -out {name}.crt"
        subprocess.run([openssl, *asked.split()], cwd=folder, check=True, capture_output=True)
    (folder / "text").write_text("no certificate")
    return folder
