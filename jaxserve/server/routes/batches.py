"""/v1/batches."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.openai.batch import BatchBody
from jaxserve.server.archive import archive_of
from jaxserve.server.bodies import answers, documents, read_body
from jaxserve.server.caller import caller_of, headers_meta, owned
from jaxserve.server.json import JsonResponse
from jaxserve.server.pages import page, parameters

router = APIRouter()
_ENDED = {"responses": {"409": {"description": "The batch has ended."}}}


@router.post("/v1/batches", openapi_extra=documents(BatchBody, answers("batch", "id", "status", "input_file_id")))
async def create(request: Request) -> Response:
    """Begin a batch."""
    _, _, batches = await archive_of(request).open()
    caller, meta = caller_of(request), headers_meta(request)
    owned(meta, caller, isolate=False)  # refuses clients that the key does not stand for
    batch = await batches.add(await read_body(request, BatchBody), caller, meta)
    return JsonResponse(batch.body())


@router.get("/v1/batches", openapi_extra=parameters("after", "limit"))
async def all_batches(request: Request) -> Response:
    """Those of the caller."""
    _, store, _ = await archive_of(request).open()
    own = store.of(caller_of(request).client)
    return JsonResponse(page(request, own, lambda batch: batch.body(), most=100, limit=20))


@router.get("/v1/batches/{batch_id}")
async def one_batch(request: Request, batch_id: str) -> Response:
    """How far a batch is."""
    _, store, _ = await archive_of(request).open()
    return JsonResponse(store.get(caller_of(request).client, batch_id).body())


@router.post("/v1/batches/{batch_id}/cancel", openapi_extra=_ENDED)
async def cancel(request: Request, batch_id: str) -> Response:
    """End a batch early."""
    _, store, batches = await archive_of(request).open()
    batch = store.get(caller_of(request).client, batch_id)
    await batches.cancel(batch)
    return JsonResponse(batch.body())
