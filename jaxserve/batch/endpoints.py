"""What a batch can ask for: routes of the server, without the server."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.errors import RequestError
from jaxserve.intake import Prompt, vectors_of
from jaxserve.openai import chat, completion, embedding, score
from jaxserve.openai.errors import ApiError
from jaxserve.openai.ids import new_id
from jaxserve.openai.prompts import listed
from jaxserve.openai.turn import Dialect
from jaxserve.output import RequestOutput
from jaxserve.request import SamplingParams, Task
from jaxserve.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What bodies are read for."""

    names: Sequence[str]  # under which it is served
    tokenizer: Tokenizer | None  # None: it knows token ids only
    dialect: Dialect  # how it writes calls and thoughts
    max_model_len: int
    embedding_size: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What the body of a line wants. `prompts` holds on to its texts, `answer` does not."""

    params: SamplingParams
    prompts: Callable[[], Sequence[Prompt]]  # takes its time
    answer: Callable[[str, Sequence[RequestOutput]], dict[str, Any]]  # name of the model, answers -> body
    task: Task = Task.GENERATE
    form: str = ""  # the field that says what the answer must look like
    keeps_text: bool = False  # the answer repeats the prompt, or depends on its text


Read = tuple[str | None, Work, dict[str, Any]]  # name of the model, what to do, fields of `Request` for the scheduler


def read_completion(raw: Mapping[str, Any], model: Model) -> Read:
    """/v1/completions.

    Raises:
      ValidationError, ApiError: the body is wrong.
    """
    body = completion.CompletionBody.model_validate(raw)
    refuse_stream(body)
    params, asked = body.params(), body.asked()
    prompts, body.prompt = body.prompts, ""
    room = model.max_model_len - (params.max_tokens or 1)
    work = Work(
        params=params,
        prompts=lambda: [body.ready(prompt, model.tokenizer, room) for prompt in prompts],
        answer=lambda name, outputs: completion.answer(body, new_id(completion.PREFIX), name, outputs, model.tokenizer),
        form=asked.field if asked else "",
        keeps_text=body.echo,
    )
    return body.model, work, body.meta()


def read_chat(raw: Mapping[str, Any], model: Model) -> Read:
    """/v1/chat/completions; raises as `read_completion`."""
    body = chat.ChatBody.model_validate(raw)
    refuse_stream(body)
    turn = body.turn(model.dialect)
    body.messages, bare = [], dataclasses.replace(turn, messages=())
    work = Work(
        params=turn.params,
        prompts=lambda: [turn.prompt(_required(model.tokenizer))],
        answer=lambda name, outputs: chat.answer(body, bare, new_id(chat.PREFIX), name, outputs[0]),
        form=turn.form,
        keeps_text=turn.reasoning is not None,  # its end says whether the answer begins with thoughts
    )
    return body.model, work, body.meta()


def read_embedding(raw: Mapping[str, Any], model: Model) -> Read:
    """/v1/embeddings; raises as `read_completion`."""
    body = embedding.EmbeddingBody.model_validate(raw)
    body.check_size(model.embedding_size)
    inputs, body.input = listed(body.input), ""

    def answer(name: str, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return embedding.answer(body, name, vectors_of(outputs, normalize=body.normalize), _num_tokens(outputs))

    return body.model, _embed(body, inputs, model, answer), body.meta()


def read_score(raw: Mapping[str, Any], model: Model) -> Read:
    """/v1/score, of pairs; raises as `read_completion`."""
    body = score.ScoreBody.model_validate(raw)
    if not body.is_pairs:
        raise ApiError(
            "prompt and continuations are not supported in a batch; use /v1/completions with echo and logprobs",
            param="continuations",
            code="unsupported_field",
        )
    left, right = body.left, body.right

    def answer(name: str, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        values = embedding.cosines(vectors_of(outputs), len(left))
        return score.pairs_answer(new_id(score.PREFIX), name, values, _num_tokens(outputs))

    return body.model, _embed(body, [*left, *right], model, answer), body.meta()


def read_rerank(raw: Mapping[str, Any], model: Model) -> Read:
    """/v1/rerank; raises as `read_completion`."""
    body = score.RerankBody.model_validate(raw)

    def answer(name: str, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        values = embedding.cosines(vectors_of(outputs), 1)
        return score.rerank_answer(body, new_id(score.RERANK_PREFIX), name, values, _num_tokens(outputs))

    return body.model, _embed(body, [body.query, *body.documents], model, answer), body.meta()


def _embed(
    body: embedding.EmbeddingBody | score.ScoreBody | score.RerankBody,
    texts: Sequence[str | list[int]],
    model: Model,
    answer: Callable[[str, Sequence[RequestOutput]], dict[str, Any]],
) -> Work:
    return Work(
        params=SamplingParams(temperature=0.0),
        prompts=lambda: [body.ready(text, model.tokenizer, model.max_model_len) for text in texts],
        answer=answer,
        task=Task.EMBED,
    )


def _num_tokens(outputs: Sequence[RequestOutput]) -> int:
    return sum(len(output.prompt_token_ids) for output in outputs)


def _required(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise RequestError("this model has no tokenizer.json", remedy="Use /v1/completions with token ids")
    return tokenizer


def refuse_stream(body: completion.CompletionBody | chat.ChatBody) -> None:
    """A batch has nobody who would listen.

    Raises:
      ApiError: the body asks for a stream.
    """
    for name in ("stream", "stream_options"):
        if getattr(body, name):
            raise ApiError(f"{name} is not supported in a batch; leave it out", param=name, code="unsupported_field")


ENDPOINTS: dict[str, Callable[[Mapping[str, Any], Model], Read]] = {
    "/v1/completions": read_completion,
    "/v1/chat/completions": read_chat,
    "/v1/embeddings": read_embedding,
    "/v1/score": read_score,
    "/v1/rerank": read_rerank,
}
