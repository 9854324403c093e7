"""/v1/embeddings: bodies -> prompts; hidden states -> bodies."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import field_validator

from jaxserve.openai.errors import ApiError
from jaxserve.openai.fields import MetaFields
from jaxserve.openai.prompts import PromptFields, Prompts, check_count

PREFIX = "embd-"
NO_PICTURES: Mapping[str, tuple[Any, ...]] = {"mm_processor_kwargs": ({},)}
MAX_INPUTS = 2048  # of one body, as OpenAI has it


class EmbeddingBody(PromptFields, MetaFields):
    """The body of a request. `normalize` (ours): whether vectors have length 1."""

    neutral = NO_PICTURES

    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    normalize: bool = True

    @field_validator("input")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return check_count(value, MAX_INPUTS)

    def check_size(self, size: int) -> None:
        """Vectors of one of our models cannot be cut: none was trained for it.

        Raises:
          ApiError: another number of dimensions is asked for than the model has.
        """
        if self.dimensions not in (None, size):
            raise ApiError(
                f"dimensions={self.dimensions}: this model's embeddings have {size}, and cannot be cut; leave it out",
                param="dimensions",
                code="unsupported_field",
            )


def answer(body: EmbeddingBody, model: str, vectors: np.ndarray, num_tokens: int) -> dict[str, Any]:
    """A list of `embedding` objects, in the order of the inputs."""
    data = [
        {"object": "embedding", "index": index, "embedding": _coded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors.astype("<f4", copy=False))
    ]
    return {"object": "list", "model": model, "data": data, "usage": prompt_usage(num_tokens)}


def prompt_usage(num_tokens: int) -> dict[str, int]:
    """Usage of what makes no tokens."""
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def cosines(vectors: np.ndarray, num_left: int) -> Sequence[float]:
    """Of pairs of vectors of length 1: the first `num_left`, one or one for each, with the others."""
    left, right = np.split(vectors, [num_left])
    return np.einsum("ne,ne->n", np.broadcast_to(left, right.shape), right).tolist()


def _coded(vector: np.ndarray, form: str) -> list[float] | str:
    return vector.tolist() if form == "float" else base64.b64encode(vector.tobytes()).decode()
