"""/v1/score and /v1/rerank: how like two texts are, in vLLM's form; and in ours, how likely continuations are.

No model of ours is a cross-encoder, so pairs are compared as vLLM does for all others: by the cosine of their embeddings.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from jaxserve.openai.embedding import MAX_INPUTS, NO_PICTURES, prompt_usage
from jaxserve.openai.envelope import envelope
from jaxserve.openai.fields import MetaFields, finite
from jaxserve.openai.prompts import PromptFields, Prompts, check_count, listed
from jaxserve.output import Score

PREFIX = "score-"
RERANK_PREFIX = "rerank-"


class ScoreBody(PromptFields, MetaFields):
    """`text_1` and `text_2`, one to one, one to many, or in pairs; or `prompt` and `continuations`."""

    neutral = NO_PICTURES

    model: str | None = None
    text_1: Prompts | None = None
    text_2: Prompts | None = None
    prompt: str | list[int] | None = None
    continuations: list[str] | list[list[int]] | None = None

    @field_validator("text_1", "text_2", "continuations")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return check_count(value, MAX_INPUTS)

    @model_validator(mode="after")
    def _one_form(self) -> "ScoreBody":
        texts = self.text_1 is not None, self.text_2 is not None
        ours = self.prompt is not None, self.continuations is not None
        if not ((all(texts) and not any(ours)) or (all(ours) and not any(texts))):
            raise ValueError("give either text_1 and text_2, or prompt and continuations")
        if all(texts) and len(self.left) not in (1, len(self.right)):
            raise ValueError(
                f"text_1 has {len(self.left)} texts and text_2 {len(self.right)}; give one, or as many in both"
            )
        if all(ours) and (self.truncate_prompt_tokens is not None or not self.add_special_tokens):
            raise ValueError("truncate_prompt_tokens and add_special_tokens are for text_1 and text_2")
        return self

    @property
    def is_pairs(self) -> bool:
        """Whether it is vLLM's form."""
        return self.text_1 is not None

    @property
    def left(self) -> list[str | list[int]]:
        """What the others are compared with: one, or one for each."""
        return listed(self.text_1 or [])

    @property
    def right(self) -> list[str | list[int]]:
        """The others."""
        return listed(self.text_2 or [])


class RerankBody(PromptFields, MetaFields):
    """Documents to be ordered by how like a query they are. `top_n`: of how many to tell; 0: of all."""

    neutral = NO_PICTURES

    model: str | None = None
    query: str
    documents: list[str]
    top_n: Annotated[int, Field(ge=0)] = 0

    @field_validator("documents")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return check_count(value, MAX_INPUTS)


def pairs_answer(response_id: str, model: str, cosines: Sequence[float], num_tokens: int) -> dict[str, Any]:
    """vLLM's form: a `score` for each pair."""
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(cosines)]
    return envelope(response_id, "list", model) | {"data": data, "usage": prompt_usage(num_tokens)}


def likelihood_answer(response_id: str, model: str, scores: Sequence[Score], num_tokens: int) -> dict[str, Any]:
    """Ours: for each continuation its log-probability (natural logarithm), as `score`, too."""
    data = [
        {
            "index": index,
            "object": "score",
            "score": finite(score.logprob),
            "logprob": finite(score.logprob),
            "token_logprobs": [finite(value) for value in score.token_logprobs],
            "token_ids": list(score.token_ids),
            "is_greedy": score.is_greedy,
        }
        for index, score in enumerate(scores)
    ]
    return envelope(response_id, "list", model) | {"data": data, "usage": prompt_usage(num_tokens)}


def rerank_answer(
    body: RerankBody, response_id: str, model: str, cosines: Sequence[float], num_tokens: int
) -> dict[str, Any]:
    """Best first; of equals the earlier one."""
    order = sorted(range(len(cosines)), key=lambda index: -cosines[index])
    results = [
        {"index": index, "document": {"text": body.documents[index]}, "relevance_score": cosines[index]}
        for index in order[: body.top_n or None]
    ]
    return {"id": response_id, "model": model, "usage": {"total_tokens": num_tokens}, "results": results}
