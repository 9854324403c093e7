"""Files and batches of a server: one folder, which it has for itself from the first use to its end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from starlette.requests import HTTPConnection

from jaxserve.config import cache_folder
from jaxserve.server.batch_state import BatchStore
from jaxserve.server.batches import Batches
from jaxserve.server.config import ServerConfig
from jaxserve.server.files import FileStore
from jaxserve.server.folder import claim
from jaxserve.server.state import ServerState


class Archive:
    """Lives in `app.state.archive`."""

    def __init__(self, state: ServerState):
        self._state = state
        self._lock: BinaryIO | None = None
        self._opening = asyncio.Lock()
        self._files: FileStore | None = None
        self._store: BatchStore | None = None
        self._batches: Batches | None = None

    def claim(self) -> None:
        """Take the folder.

        Raises:
          UnavailableError: another server has it, or it cannot be written in.
        """
        if self._lock is None:
            self._lock = claim(folder_of(self._state.config))

    async def open(self) -> tuple[FileStore, BatchStore, Batches]:
        """All three; unfinished batches go on from the first call on.

        Raises:
          UnavailableError: another server has the folder, or it cannot be written in.
        """
        async with self._opening:
            if self._files is None or self._store is None or self._batches is None:
                await asyncio.to_thread(self._read)
                assert self._files is not None and self._store is not None
                self._batches = Batches(self._state, self._store, self._files)
        return self._files, self._store, self._batches

    def _read(self) -> None:
        self.claim()
        config, folder = self._state.config, folder_of(self._state.config)
        self._files = FileStore(
            folder / "files",
            max_bytes=config.max_file_bytes,
            max_client_bytes=config.max_client_file_bytes,
            ttl_s=config.file_ttl,
        )
        self._store = BatchStore(folder / "batches", config.file_ttl)

    async def pause(self) -> None:
        """Stop batches where they are: the server is about to end, and their requests need not be waited for."""
        if self._batches is not None:
            await self._batches.close()

    @contextlib.asynccontextmanager
    async def living(self) -> AsyncIterator[None]:
        """From the start of the app to its end. Opened at once if the folder is claimed already."""
        if self._lock is not None:
            await self.open()
        try:
            yield
        finally:
            await self.pause()
            if self._lock is not None:
                self._lock.close()
            self._lock = self._files = self._store = self._batches = None


def folder_of(config: ServerConfig) -> Path:
    """Where files and batches are."""
    return Path(config.files_dir) if config.files_dir is not None else cache_folder() / "files"


def archive_of(connection: HTTPConnection) -> Archive:
    """That of the app that a request has come to."""
    return connection.app.state.archive
