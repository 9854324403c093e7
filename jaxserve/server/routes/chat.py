"""/v1/chat/completions."""

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.openai.chat import PREFIX, ChatBody, Chunks, answer
from jaxserve.openai.ids import new_id
from jaxserve.server.aside import answered, size_of
from jaxserve.server.bodies import answers, documents, read_body
from jaxserve.server.caller import meta_of
from jaxserve.server.merge import merged
from jaxserve.server.sse import EventStream, while_there
from jaxserve.server.state import state_of
from jaxserve.server.turns import start
from jaxserve.stream import Pace, Stream

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    openapi_extra=documents(
        ChatBody, answers("chat.completion", "id", "created", "model", "choices", "usage"), streams=True
    ),
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    state, body = state_of(request), await read_body(request, ChatBody)
    model, meta, engine = state.model(body.model), meta_of(request, body), state.ready_engine
    turn, response_id = body.turn(state.dialect), new_id(PREFIX)
    stream = await start(engine, turn, meta, response_id)
    if body.stream:
        return EventStream(_frames(stream, Chunks(body, turn, response_id, model), state.pace))
    output = await while_there(request, engine.finish(stream))
    return await answered(engine, size_of([output]), lambda: answer(body, turn, response_id, model, output))


async def _frames(stream: Stream, chunks: Chunks, pace: Pace) -> AsyncIterator[bytes]:
    async for _, events in merged([stream], pace):
        content = b"".join([chunks.of(event) for event in events])
        if content:
            yield content
    assert stream.output is not None
    yield chunks.end(stream.output)
