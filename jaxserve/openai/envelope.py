"""What all answers have in common: times, usage, and the frames of a stream."""

import json
import time
from collections.abc import Sequence
from typing import Any

from jaxserve.output import RequestOutput

_PIECE = 4096  # numbers that are encoded at a time; some ms
DONE = b"data: [DONE]\n\n"
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)  # made once: it takes a while


def envelope(response_id: str, kind: str, model: str) -> dict[str, Any]:
    """The first fields of an answer, or of each chunk of a stream."""
    return {"id": response_id, "object": kind, "created": int(time.time()), "model": model}


def usage(outputs: Sequence[RequestOutput], *, prompt_only: bool = False) -> dict[str, Any]:
    """Tokens of prompts and answers so far."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    answers = [] if prompt_only else [answer for output in outputs for answer in output.outputs]
    num_answer = sum(len(answer.token_ids) for answer in answers)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": sum(output.metrics.num_cached_tokens for output in outputs)},
    }


def usage_so_far(output: RequestOutput, num_answer: int) -> dict[str, Any]:
    """Usage in the middle of a stream, by the answer tokens that it has told: the output is ahead of it."""
    known = usage([output], prompt_only=True)
    return known | {"completion_tokens": num_answer, "total_tokens": known["prompt_tokens"] + num_answer}


def frame(content: Any) -> bytes:
    """A server-sent event without a name."""
    return b"data: " + dumps(content) + b"\n\n"


def dumps(content: Any) -> bytes:
    """JSON, as short as it can be."""
    return _ENCODER.encode(content).encode()


def dumps_in_pieces(content: Any) -> bytes:
    """The same, for what is long: the encoder holds Python's lock until it is done, but may be asked for parts."""
    return _pieces(content).encode()


def _pieces(value: Any) -> str:
    match value:
        case dict() if any(isinstance(item, dict | list) for item in value.values()):
            return "{" + ",".join([f"{_ENCODER.encode(key)}:{_pieces(item)}" for key, item in value.items()]) + "}"
        case [*_, dict() | list()]:  # the first of log-probabilities may be None
            return "[" + ",".join(map(_pieces, value)) + "]"
        case list() if len(value) > _PIECE:
            parts = (value[start : start + _PIECE] for start in range(0, len(value), _PIECE))
            return "[" + ",".join(_ENCODER.encode(part)[1:-1] for part in parts) + "]"
        case _:
            return _ENCODER.encode(value)
