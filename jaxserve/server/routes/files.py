"""/v1/files."""

import asyncio

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from jaxserve.openai.batch import ExpiresAfter
from jaxserve.openai.errors import ApiError, of_validation
from jaxserve.server.archive import archive_of
from jaxserve.server.caller import caller_of
from jaxserve.server.download import Download
from jaxserve.server.files import BATCH
from jaxserve.server.json import JsonResponse
from jaxserve.server.pages import page, parameters
from jaxserve.server.upload import FORM, read_form

router = APIRouter()


@router.post("/v1/files", openapi_extra=FORM)
async def upload(request: Request) -> Response:
    """Keep a file."""
    files, _, _ = await archive_of(request).open()
    form = await read_form(request, files.max_bytes)
    try:
        purpose = form.fields.get("purpose")
        if purpose != BATCH:
            raise ApiError(f"purpose must be {BATCH!r}: nothing else is done with files here", param="purpose")
        made = await asyncio.to_thread(
            files.add,
            form.content,
            client=caller_of(request).client,
            filename=form.file.filename or "",
            purpose=purpose,
            ttl_s=_ttl_s(form.fields),
        )
    finally:
        await form.file.close()
    return JsonResponse(made.body())


@router.get("/v1/files", openapi_extra=parameters("after", "limit", "order", "purpose"))
async def all_files(request: Request) -> Response:
    """Those of the caller."""
    files, _, _ = await archive_of(request).open()
    own = files.of(caller_of(request).client, request.query_params.get("purpose"))
    return JsonResponse(page(request, own, lambda file: file.body(), most=10_000, limit=10_000))


@router.get("/v1/files/{file_id}")
async def one_file(request: Request, file_id: str) -> Response:
    """What is known of a file."""
    files, _, _ = await archive_of(request).open()
    return JsonResponse(files.get(caller_of(request).client, file_id).body())


@router.delete("/v1/files/{file_id}")
async def delete(request: Request, file_id: str) -> Response:
    """Forget a file."""
    files, _, _ = await archive_of(request).open()
    await asyncio.to_thread(files.delete, caller_of(request).client, file_id)
    return JsonResponse({"id": file_id, "object": "file", "deleted": True})


@router.get("/v1/files/{file_id}/content", response_class=Response)
async def content(request: Request, file_id: str) -> Response:
    """What is in a file."""
    files, _, _ = await archive_of(request).open()
    file = files.get(caller_of(request).client, file_id)
    return Download(files.path(file), file)


def _ttl_s(fields: dict[str, str]) -> float | None:
    """Seconds, if the form gives any.

    Raises:
      ApiError: they cannot be meant.
    """
    given = {name: fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds")}
    if not any(given.values()):
        return None
    try:
        return ExpiresAfter.model_validate(given, strict=False).seconds
    except ValidationError as error:
        told = of_validation(error)
        told.param = f"expires_after.{told.param}"
        raise told from None
