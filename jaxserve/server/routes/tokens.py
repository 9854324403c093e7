"""/tokenize, /detokenize and /tokenizer_info: what a client needs who has not got the model's files."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.openai.tokens import DetokenizeBody, TokenizeBody, tokenize_answer
from jaxserve.server.bodies import answers, documents, read_body
from jaxserve.server.json import JsonResponse, LongJsonResponse
from jaxserve.server.state import state_of

router = APIRouter()


@router.post(
    "/tokenize", openapi_extra=documents(TokenizeBody, answers("", "count", "max_model_len", "tokens", "token_strs"))
)
async def tokenize(request: Request) -> Response:
    """The tokens of a text or of a conversation."""
    state, body = state_of(request), await read_body(request, TokenizeBody)
    state.model(body.model)
    engine, dialect = state.ready_engine, state.dialect

    def answer() -> Response:
        ids = body.tokens(engine.tokenizer, dialect)
        return LongJsonResponse(tokenize_answer(body, ids, engine.tokenizer, engine.max_model_len))

    return await engine.prepare(answer)


@router.post("/detokenize", openapi_extra=documents(DetokenizeBody, answers("", "prompt")))
async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    state, body = state_of(request), await read_body(request, DetokenizeBody)
    state.model(body.model)
    engine = state.ready_engine
    return JsonResponse({"prompt": await engine.prepare(body.text, engine.tokenizer)})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """Special tokens and the chat template, under the names of `tokenizer_config.json`."""
    tokenizer = state_of(request).ready_engine.tokenizer
    return JsonResponse({**tokenizer.special_tokens, "chat_template": tokenizer.chat_template})
