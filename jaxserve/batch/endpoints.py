"""What a batch can ask for: the routes of the server, without the server."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.batch import interim
from jaxserve.errors import RequestError
from jaxserve.intake import Prompt
from jaxserve.openai import chat, completion
from jaxserve.openai.envelope import new_id
from jaxserve.openai.errors import ApiError
from jaxserve.openai.turn import Dialect
from jaxserve.output import RequestOutput
from jaxserve.request import SamplingParams, Task
from jaxserve.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What the body of a line wants. `prompts` holds on to its texts, `answer` does not."""

    params: SamplingParams
    # Given the most tokens of prompt and answer; takes its time.
    prompts: Callable[[Tokenizer | None, int], Sequence[Prompt]]
    answer: Callable[[str, Sequence[RequestOutput], Tokenizer | None], dict[str, Any]]  # model, answers -> body
    task: Task = Task.GENERATE
    keeps_text: bool = False  # the answer repeats the prompt


Read = tuple[str | None, Work, dict[str, Any]]  # model, what to do, fields of `Request` for the scheduler


def read_completion(raw: Mapping[str, Any], dialect: Dialect) -> Read:
    """/v1/completions.

    Raises:
      ValidationError, ApiError: the body is wrong.
    """
    del dialect
    body = completion.CompletionBody.model_validate(raw)
    refuse_stream(body)
    prompts, body.prompt, params = body.prompts, "", body.params()
    num_answer = params.max_tokens or 1
    work = Work(
        params=params,
        prompts=lambda tokenizer, most: [body.ready(prompt, tokenizer, most - num_answer) for prompt in prompts],
        answer=lambda model, outputs, tokenizer: completion.answer(
            body, new_id(completion.PREFIX), model, outputs, tokenizer
        ),
        keeps_text=body.echo,
    )
    return body.model, work, body.meta()


def read_chat(raw: Mapping[str, Any], dialect: Dialect) -> Read:
    """/v1/chat/completions; raises as `read_completion`."""
    body = chat.ChatBody.model_validate(raw)
    refuse_stream(body)
    turn = body.turn(dialect)
    body.messages, bare = [], dataclasses.replace(turn, messages=())
    work = Work(
        params=turn.params,
        prompts=lambda tokenizer, _: [turn.prompt(_required(tokenizer))],
        answer=lambda model, outputs, _: chat.answer(body, bare, new_id(chat.PREFIX), model, outputs[0]),
        keeps_text=turn.reasoning is not None,  # its end says whether the answer begins with thoughts
    )
    return body.model, work, body.meta()


def read_embedding(raw: Mapping[str, Any], dialect: Dialect) -> Read:
    """/v1/embeddings; raises as `read_completion`."""
    del dialect
    body = interim.EmbeddingBody.model_validate(raw)
    inputs, body.input = body.prompts, ""
    work = Work(
        params=SamplingParams(temperature=0.0),
        prompts=lambda *_: inputs,
        answer=lambda model, outputs, _: interim.embedding_answer(body, model, outputs),
        task=Task.EMBED,
    )
    return body.model, work, body.meta()


def _required(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise RequestError("this model has no tokenizer.json", remedy="Use /v1/completions with token ids")
    return tokenizer


def refuse_stream(body: Any) -> None:
    """A batch has nobody who would listen.

    Raises:
      ApiError: the body asks for a stream.
    """
    for name in ("stream", "stream_options"):
        if getattr(body, name):
            raise ApiError(f"{name} is not supported in a batch; leave it out", param=name, code="unsupported_field")


ENDPOINTS: dict[str, Callable[[Mapping[str, Any], Dialect], Read]] = {
    "/v1/completions": read_completion,
    "/v1/chat/completions": read_chat,
    "/v1/embeddings": read_embedding,
}
