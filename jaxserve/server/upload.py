"""Forms with a file in them, read as they come: what is in memory never depends on how long the file is."""

import dataclasses
from collections.abc import AsyncGenerator
from typing import Any, BinaryIO

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from jaxserve.openai.errors import ApiError
from jaxserve.server.config import FORM_BYTES
from jaxserve.server.files import too_long


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """The file of a form, on disk if it is long, and its other fields."""

    file: UploadFile
    fields: dict[str, str]

    @property
    def content(self) -> BinaryIO:
        """Of the file."""
        return self.file.file


async def read_form(request: Request, max_bytes: int) -> Form:
    """The form that a request brings. Close its file.

    Raises:
      ApiError: it is none, has no `file`, or is longer than `max_bytes`.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError("the body must be multipart/form-data", status=415, code="unsupported_media_type")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_bytes + FORM_BYTES:
        raise too_long(max_bytes)
    content = _limited(request, max_bytes)
    parser = MultiPartParser(request.headers, content, max_files=1, max_fields=8, max_part_size=1 << 10)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(f"the form cannot be read: {error.message:.200}", code="invalid_form") from None
    file = form.get("file")
    if not isinstance(file, UploadFile):
        await form.close()
        raise ApiError("the form has no file", param="file", code="missing_file")
    return Form(file, {key: value for key, value in form.items() if isinstance(value, str)})


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    num_bytes = 0
    async for piece in request.stream():
        num_bytes += len(piece)
        if num_bytes > max_bytes + FORM_BYTES:
            raise too_long(max_bytes)
        yield piece


FORM: dict[str, Any] = {
    "responses": {"415": {"description": "The body is no form."}},
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    },
}
