"""What a batch can ask for: the routes of the server, without the server."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxserve.batch import interim
from jaxserve.intake import Prompt
from jaxserve.openai import completion
from jaxserve.openai.envelope import new_id
from jaxserve.openai.errors import ApiError
from jaxserve.output import RequestOutput
from jaxserve.request import SamplingParams, Task
from jaxserve.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What the body of a line wants. `prompts` holds on to its texts, `answer` does not."""

    params: SamplingParams
    prompts: Callable[[Tokenizer | None], Sequence[Prompt]]  # takes its time
    answer: Callable[[str, Sequence[RequestOutput], Tokenizer | None], dict[str, Any]]  # model, answers -> body
    task: Task = Task.GENERATE
    keeps_text: bool = False  # the answer repeats the prompt


Read = tuple[str | None, Work, dict[str, Any]]  # model, what to do, fields of `Request` for the scheduler


def read_completion(raw: Mapping[str, Any]) -> Read:
    """/v1/completions.

    Raises:
      ValidationError, ApiError: the body is wrong.
    """
    body = completion.CompletionBody.model_validate(raw)
    refuse_stream(body)
    prompts, body.prompt = body.prompts, ""
    work = Work(
        params=body.params(),
        prompts=lambda tokenizer: [body.ready(prompt, tokenizer) for prompt in prompts],
        answer=lambda model, outputs, tokenizer: completion.answer(
            body, new_id(completion.PREFIX), model, outputs, tokenizer
        ),
        keeps_text=body.echo,
    )
    return body.model, work, body.meta()


def read_chat(raw: Mapping[str, Any]) -> Read:
    """/v1/chat/completions; raises as `read_completion`."""
    body = interim.ChatBody.model_validate(raw)
    refuse_stream(body)
    bare = body.model_copy(update={"messages": []})
    work = Work(
        params=body.params(),
        prompts=lambda tokenizer: [body.ready(tokenizer)],
        answer=lambda model, outputs, _: interim.chat_answer(bare, new_id("chatcmpl"), model, outputs),
    )
    return body.model, work, body.meta()


def read_embedding(raw: Mapping[str, Any]) -> Read:
    """/v1/embeddings; raises as `read_completion`."""
    body = interim.EmbeddingBody.model_validate(raw)
    bare = body.model_copy(update={"input": ""})
    work = Work(
        params=SamplingParams(temperature=0.0),
        prompts=lambda _: body.prompts,
        answer=lambda model, outputs, _: interim.embedding_answer(bare, model, outputs),
        task=Task.EMBED,
    )
    return body.model, work, body.meta()


def refuse_stream(body: Any) -> None:
    """A batch has nobody who would listen.

    Raises:
      ApiError: the body asks for a stream.
    """
    for name in ("stream", "stream_options"):
        if getattr(body, name):
            raise ApiError(f"{name} is not supported in a batch; leave it out", param=name, code="unsupported_field")


ENDPOINTS: dict[str, Callable[[Mapping[str, Any]], Read]] = {
    "/v1/completions": read_completion,
    "/v1/chat/completions": read_chat,
    "/v1/embeddings": read_embedding,
}
