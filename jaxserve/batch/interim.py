"""Chats and embeddings, until jaxserve/openai has them."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from jaxserve.intake import Prompt
from jaxserve.openai.envelope import envelope, usage
from jaxserve.openai.errors import ApiError
from jaxserve.openai.fields import NEUTRAL, Body, MetaFields, SamplingFields, StreamOptions
from jaxserve.openai.logprobs import chat_logprobs, prompt_logprobs
from jaxserve.output import RequestOutput
from jaxserve.request import SamplingParams
from jaxserve.tokenizer import Tokenizer


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: str
    content: str | list[TextPart]
    name: str | None = None


class ChatBody(SamplingFields, MetaFields):
    neutral = NEUTRAL | {
        "tools": ([],),
        "tool_choice": ("none",),
        "parallel_tool_calls": (True, False),
        "response_format": ({"type": "text"},),
        "continue_final_message": (False,),
    }

    model: str | None = None
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions | None = None

    def params(self) -> SamplingParams:
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise ApiError("max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
        if not self.messages:
            raise ApiError("messages must be a list with at least one message", param="messages")
        taken = {"messages", "tools", "documents", "add_generation_prompt"} & set(self.chat_template_kwargs)
        if taken:
            raise ApiError(f"chat_template_kwargs must not set {min(taken)}", param="chat_template_kwargs")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling_params(logprobs=logprobs, max_tokens=next(iter(limits), None))

    def ready(self, tokenizer: Tokenizer | None) -> Prompt:
        if tokenizer is None:
            raise ApiError("this model has no tokenizer; use /v1/completions with token ids", param="messages")
        messages = [_plain(message) for message in self.messages]
        variables = dict(self.chat_template_kwargs)
        if self.add_generation_prompt is not None:
            variables["add_generation_prompt"] = self.add_generation_prompt
        text = tokenizer.apply_chat_template(messages, **variables)
        return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}


def _plain(message: Message) -> dict[str, Any]:
    text = message.content if isinstance(message.content, str) else "\n".join(part.text for part in message.content)
    return {"role": message.role, "content": text} | ({"name": message.name} if message.name else {})


def chat_answer(body: ChatBody, response_id: str, model: str, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    (output,) = outputs
    choices = []
    for each in output.outputs:
        logprobs = None
        if each.logprobs is not None:
            logprobs = chat_logprobs(each.token_ids, each.logprobs, body.top_logprobs or 0)
        choice: Mapping[str, Any] = {
            "index": each.index,
            "message": {"role": "assistant", "content": each.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": each.finish_reason,
            "stop_reason": each.stop_reason,
        }
        choices.append(choice | ({} if body.prompt_logprobs is None else {"prompt_logprobs": prompt_logprobs(output)}))
    return envelope(response_id, "chat.completion", model) | {"choices": choices, "usage": usage(outputs)}


class EmbeddingBody(MetaFields):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"dimensions": ()}

    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"

    @property
    def prompts(self) -> list[Prompt]:
        if isinstance(self.input, str) or (self.input and isinstance(self.input[0], int)):
            return [self.input]  # pyright: ignore[reportReturnType]
        return list(self.input)  # pyright: ignore[reportArgumentType, reportReturnType]


def embedding_answer(body: EmbeddingBody, model: str, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    rows = [
        {"object": "embedding", "index": index, "embedding": _vector(body, output.hidden)}
        for index, output in enumerate(outputs)
    ]
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    totals = {"prompt_tokens": num_prompt, "total_tokens": num_prompt}
    return {"object": "list", "data": rows, "model": model, "usage": totals}


def _vector(body: EmbeddingBody, hidden: np.ndarray | None) -> list[float] | str:
    assert hidden is not None
    unit = hidden / max(float((hidden**2).sum()) ** 0.5, 1e-12)
    if body.encoding_format == "base64":
        return base64.b64encode(unit.astype("<f4").tobytes()).decode()
    return [float(value) for value in unit]
