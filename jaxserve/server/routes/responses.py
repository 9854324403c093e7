"""/v1/responses."""

from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter, Request
from starlette.responses import Response as HttpResponse

from jaxserve.async_engine import AsyncEngine
from jaxserve.errors import JaxserveError
from jaxserve.openai.errors import ApiError, api_error
from jaxserve.openai.ids import new_id
from jaxserve.openai.messages import Message
from jaxserve.openai.response_output import Response
from jaxserve.openai.responses import PREFIX, ResponseBody
from jaxserve.output import RequestOutput
from jaxserve.server.aside import answered, aside, size_of
from jaxserve.server.bodies import answers, documents, read_body
from jaxserve.server.caller import caller_of, meta_of
from jaxserve.server.json import JsonResponse
from jaxserve.server.merge import merged
from jaxserve.server.sse import EventStream, while_there
from jaxserve.server.state import ServerState, state_of
from jaxserve.server.turns import start
from jaxserve.stream import Pace, Stream

router = APIRouter()


class _Job:
    """A response in the making, and where it will be kept."""

    def __init__(self, state: ServerState, client: str, body: ResponseBody, history: Sequence[Message]):
        self._state = state
        self._client = client
        self._stored = _is_stored(state, body)
        self._before = [*history, *body.said]
        model, self.turn = state.model(body.model), body.turn(state.dialect, history)
        self.id = new_id(PREFIX)
        self.response = Response(body, self.turn, self.id, model, stored=self._stored)

    async def end(self, engine: AsyncEngine, output: RequestOutput) -> bytes:
        """The last frame. What was made is kept, if that is wanted."""
        thoughts, num_thought = self.response.thoughts, 0
        if thoughts:  # they are counted as text: which token ended them is not known any more
            ids = await engine.prepare(engine.intake.tokenizer.encode, thoughts, add_special_tokens=False)
            num_thought = len(ids)
        last = self.response.end(output, num_thought)
        if self._stored:
            conversation = [*self._before, *self.response.messages()]
            self._state.responses.put(self._client, self.response.body, conversation)
        return last


@router.post(
    "/v1/responses",
    openapi_extra=documents(ResponseBody, answers("response", "id", "model", "output", "status"), streams=True),
)
async def create_response(request: Request) -> HttpResponse:
    """Answer a conversation, which may go on from an earlier response."""
    state, body = state_of(request), await read_body(request, ResponseBody)
    client, engine = caller_of(request).client, state.ready_engine
    job = _Job(state, client, body, _history(state, client, body.previous_response_id))
    stream = await start(engine, job.turn, meta_of(request, body), job.id)
    if body.stream:
        return EventStream(_frames(engine, job, stream, state.pace), done=b"")
    output = await while_there(request, engine.finish(stream))
    size = size_of([output])
    await aside(engine, size, lambda: job.response.whole(output))
    await job.end(engine, output)
    return await answered(engine, size, lambda: job.response.body)


@router.get("/v1/responses/{response_id}")
async def get_response(request: Request, response_id: str) -> HttpResponse:
    """A response that was made before."""
    if request.query_params.get("stream") == "true":
        raise ApiError("a response that was made before cannot be streamed", param="stream", code="unsupported_field")
    found = state_of(request).responses.get(caller_of(request).client, response_id)
    if found is None:
        raise _unknown(response_id)
    return HttpResponse(found.response, media_type="application/json")


@router.delete("/v1/responses/{response_id}")
async def delete_response(request: Request, response_id: str) -> HttpResponse:
    """Forget it."""
    if not state_of(request).responses.delete(caller_of(request).client, response_id):
        raise _unknown(response_id)
    return JsonResponse({"id": response_id, "object": "response", "deleted": True})


async def _frames(engine: AsyncEngine, job: _Job, stream: Stream, pace: Pace) -> AsyncIterator[bytes]:
    has_begun = False
    try:
        async for _, events in merged([stream], pace):
            first = b"" if has_begun else job.response.created()
            has_begun = True
            content = first + b"".join([job.response.of(event) for event in events])
            if content:
                yield content
        assert stream.output is not None
        yield await job.end(engine, stream.output)
    except JaxserveError as error:
        if not has_begun:
            raise
        yield job.response.failed(api_error(error).message)


def _is_stored(state: ServerState, body: ResponseBody) -> bool:
    if body.store and not state.responses.is_on:
        raise ApiError("this server stores no responses; send store: false", param="store", code="unsupported_field")
    return state.responses.is_on and body.store is not False


def _history(state: ServerState, client: str, response_id: str | None) -> Sequence[Message]:
    if response_id is None:
        return ()
    found = state.responses.get(client, response_id)
    if found is None:
        raise ApiError(
            f"there is no response {response_id[:80]!r}, or not any more; send the whole conversation as input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return found.messages


def _unknown(response_id: str) -> ApiError:
    told = f"there is no response {response_id[:80]!r}, or not any more"
    return ApiError(told, status=404, code="response_not_found", param="response_id")
