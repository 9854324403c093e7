"""/v1/completions."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.openai.completion import PREFIX, Chunks, CompletionBody, answer
from jaxserve.openai.ids import new_id
from jaxserve.output import RequestOutput
from jaxserve.request import SamplingParams
from jaxserve.server.aside import answered, size_of
from jaxserve.server.bodies import answers, documents, read_body
from jaxserve.server.caller import meta_of
from jaxserve.server.merge import merged
from jaxserve.server.sse import EventStream, while_there
from jaxserve.server.state import ServerState, state_of
from jaxserve.server.turns import made
from jaxserve.stream import Pace, Stream

router = APIRouter()


@router.post(
    "/v1/completions",
    openapi_extra=documents(
        CompletionBody, answers("text_completion", "id", "created", "model", "choices", "usage"), streams=True
    ),
)
async def completions(request: Request) -> Response:
    """Complete one prompt or several."""
    state, body = state_of(request), await read_body(request, CompletionBody)
    model, params, meta = state.model(body.model), body.params(), meta_of(request, body)
    response_id = new_id(PREFIX)
    streams = await start(state, body, params, meta, response_id)
    if body.stream:
        chunks = Chunks(body, response_id, model, state.tokenizer)
        return EventStream(_frames(streams, chunks, state.pace))
    outputs = await while_there(request, finish(state, streams))
    size, tokenizer = size_of(outputs), state.tokenizer
    return await answered(state.ready_engine, size, lambda: answer(body, response_id, model, outputs, tokenizer))


async def start(
    state: ServerState, body: CompletionBody, params: SamplingParams, meta: dict[str, Any], response_id: str
) -> list[Stream]:
    """Hand all prompts to the engine, or none of them."""
    engine, tokenizer = state.ready_engine, state.tokenizer

    def one(number: int, prompt: str | list[int]) -> Any:
        request_id = response_id if len(prompts) == 1 else f"{response_id}-{number}"
        ready = body.ready(prompt, tokenizer, engine.max_model_len - (params.max_tokens or 1))
        return made(engine, ready, params, form, meta=meta, request_id=request_id)

    prompts, asked = body.prompts, body.asked()
    form = asked.field if asked else ""
    requests = [await engine.prepare(one, number, prompt) for number, prompt in enumerate(prompts)]
    streams = list[Stream]()
    try:
        for each in requests:
            streams.append(engine.start(*each))
    except BaseException:
        for stream in streams:
            stream.abort()
        raise
    return streams


async def finish(state: ServerState, streams: list[Stream]) -> list[RequestOutput]:
    """Wait for all answers; who is cancelled, or loses one, takes the others back."""
    try:
        return list(await asyncio.gather(*map(state.ready_engine.finish, streams)))
    finally:
        for stream in streams:
            stream.abort()


async def _frames(streams: list[Stream], chunks: Chunks, pace: Pace) -> AsyncIterator[bytes]:
    async for number, events in merged(streams, pace):
        content = b"".join([chunks.of(number, event) for event in events])
        if content:
            yield content
    yield chunks.end([stream.output for stream in streams if stream.output is not None])
