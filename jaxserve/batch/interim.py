"""Embeddings, until jaxserve/openai has them."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from jaxserve.intake import Prompt
from jaxserve.openai.fields import MetaFields
from jaxserve.output import RequestOutput


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
