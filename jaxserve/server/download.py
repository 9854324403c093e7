"""The content of a stored file as an answer."""

import asyncio
import os
from pathlib import Path
from urllib.parse import quote

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.server.files import StoredFile, not_there

_PIECE = 1 << 18  # bytes that are in memory at a time


class Download(Response):
    """Opens the file before it says anything: somebody may delete it at any moment, and who reads it then reads on.

    Starlette's FileResponse looks first and opens later. Browsers are told not to guess what the content is.

    Raises:
      ApiError: 404, when it is sent: the file has just been deleted.
    """

    media_type = "application/octet-stream"

    def __init__(self, path: Path, file: StoredFile):
        quoted = quote(file.filename, safe="")
        plain = quoted == file.filename
        name = f'filename="{quoted}"' if plain else f"filename*=utf-8''{quoted}"
        super().__init__(headers={"content-disposition": f"attachment; {name}", "x-content-type-options": "nosniff"})
        self._path = path
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            content = await asyncio.to_thread(self._path.open, "rb")
        except FileNotFoundError:
            raise not_there(self._file.file_id) from None
        with content:
            self.headers["content-length"] = str(os.fstat(content.fileno()).st_size)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while piece := await asyncio.to_thread(content.read, _PIECE):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
