"""/v1/embeddings, and what is made of embeddings: /v1/score and /v1/rerank (vLLM has them without /v1, too)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxserve.intake import score_of, vectors_of
from jaxserve.openai import embedding, score
from jaxserve.openai.embedding import EmbeddingBody, cosines
from jaxserve.openai.ids import new_id
from jaxserve.openai.prompts import PromptFields, listed
from jaxserve.openai.score import RerankBody, ScoreBody
from jaxserve.server.aside import answered, size_of
from jaxserve.server.bodies import answers, documents, read_body
from jaxserve.server.caller import meta_of
from jaxserve.server.json import JsonResponse
from jaxserve.server.sse import while_there
from jaxserve.server.state import ServerState, state_of

router = APIRouter()


@router.post("/v1/embeddings", openapi_extra=documents(EmbeddingBody, answers("list", "model", "data", "usage")))
async def embeddings(request: Request) -> Response:
    """Embed one text or several."""
    state, body = state_of(request), await read_body(request, EmbeddingBody)
    model, meta = state.model(body.model), meta_of(request, body)
    body.check_size(state.ready_engine.embedding_size)
    inputs = listed(body.input)
    work = _vectors(state, body, inputs, meta, new_id(embedding.PREFIX), normalize=body.normalize)
    vectors, num_tokens = await while_there(request, work)
    engine = state.ready_engine
    return await answered(engine, vectors.size, lambda: embedding.answer(body, model, vectors, num_tokens))


@router.post("/score", include_in_schema=False)
@router.post(
    "/v1/score", openapi_extra=documents(ScoreBody, answers("list", "id", "created", "model", "data", "usage"))
)
async def scores(request: Request) -> Response:
    """Compare texts, or tell how likely continuations of a prompt are."""
    state, body = state_of(request), await read_body(request, ScoreBody)
    model, meta, response_id = state.model(body.model), meta_of(request, body), new_id(score.PREFIX)
    if body.is_pairs:
        work = _cosines(state, body, body.left, body.right, meta, response_id)
        values, num_tokens = await while_there(request, work)
        return JsonResponse(score.pairs_answer(response_id, model, values, num_tokens))
    return await while_there(request, _likelihoods(state, body, model, meta, response_id))


@router.post("/rerank", include_in_schema=False)
@router.post("/v1/rerank", openapi_extra=documents(RerankBody, answers("", "id", "model", "results", "usage")))
async def rerank(request: Request) -> Response:
    """Order documents by how like a query they are."""
    state, body = state_of(request), await read_body(request, RerankBody)
    model, meta, response_id = state.model(body.model), meta_of(request, body), new_id(score.RERANK_PREFIX)
    work = _cosines(state, body, [body.query], body.documents, meta, response_id)
    values, num_tokens = await while_there(request, work)
    return JsonResponse(score.rerank_answer(body, response_id, model, values, num_tokens))


async def _vectors(
    state: ServerState,
    body: PromptFields,
    prompts: Sequence[str | list[int]],
    meta: dict[str, Any],
    response_id: str,
    *,
    normalize: bool = True,
) -> tuple[np.ndarray, int]:
    """Embeddings, and how many tokens they took."""
    engine, tokenizer = state.ready_engine, state.tokenizer

    def one(number: int, prompt: str | list[int]) -> Any:
        ready = body.ready(prompt, tokenizer, engine.max_model_len)
        return engine.intake.embed_request(ready, meta=meta, request_id=f"{response_id}-{number}")

    made = await engine.prepare(lambda: [one(*each) for each in enumerate(prompts)])
    outputs = await engine.finish_all(made)
    return vectors_of(outputs, normalize=normalize), sum(len(output.prompt_token_ids) for output in outputs)


async def _cosines(
    state: ServerState,
    body: PromptFields,
    left: Sequence[str | list[int]],
    right: Sequence[str | list[int]],
    meta: dict[str, Any],
    response_id: str,
) -> tuple[Sequence[float], int]:
    vectors, num_tokens = await _vectors(state, body, [*left, *right], meta, response_id)
    return cosines(vectors, len(left)), num_tokens


async def _likelihoods(
    state: ServerState, body: ScoreBody, model: str, meta: dict[str, Any], response_id: str
) -> Response:
    engine, prompt, continuations = state.ready_engine, body.prompt, body.continuations
    assert prompt is not None and continuations is not None

    def one(number: int, continuation: str | list[int]) -> Any:
        return engine.intake.score_request(prompt, continuation, meta=meta, request_id=f"{response_id}-{number}")

    made = await engine.prepare(lambda: [one(*each) for each in enumerate(continuations)])
    outputs = await engine.finish_all(made)
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)

    def answer() -> dict[str, Any]:
        found = [score_of(request, output) for (request, _), output in zip(made, outputs, strict=True)]
        return score.likelihood_answer(response_id, model, found, num_tokens)

    return await answered(engine, size_of(outputs), answer)
