"""The fields of OpenAI request bodies: their types, and what is not supported unless it changes nothing."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.config import nearest


class LineError(Exception):
    """A line that cannot be answered. `code` is for programs, the message for people, `param` names the field."""

    def __init__(self, message: str, *, code: str = "invalid_request", param: str | None = None, status: int = 400):
        super().__init__(message)
        self.code = code
        self.param = param
        self.status = status

    @property
    def error_type(self) -> str:
        """OpenAI's `type` of an error."""
        return "server_error" if self.status >= 500 else "invalid_request_error"


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(is_whole(item) for item in value)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "nothing")


Check = tuple[Callable[[Any], bool], str]  # (is the value of the right type?, how to say what is wanted)
WHOLE: Check = (is_whole, "a whole number")
NUMBER: Check = (is_number, "a number")
TEXT: Check = (lambda value: isinstance(value, str), "a text")
BOOLEAN: Check = (lambda value: isinstance(value, bool), "true or false")
OBJECT: Check = (lambda value: isinstance(value, dict), "an object")
TOKEN_IDS: Check = (are_whole, "a list of token ids")
TEXTS: Check = (are_texts, "a list of texts")
STOP: Check = (lambda value: isinstance(value, str) or are_texts(value), "a text or a list of texts")
ANY: Check = (lambda _: True, "")  # checked where it is read

SAMPLING: dict[str, Check] = {
    # OpenAI's
    "n": WHOLE,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "seed": WHOLE,
    "stop": STOP,
    "max_tokens": WHOLE,
    "logit_bias": OBJECT,
    "logprobs": WHOLE,
    # vLLM's
    "top_k": WHOLE,
    "min_p": NUMBER,
    "repetition_penalty": NUMBER,
    "stop_token_ids": TOKEN_IDS,
    "include_stop_str_in_output": BOOLEAN,
    "ignore_eos": BOOLEAN,
    "min_tokens": WHOLE,
    "skip_special_tokens": BOOLEAN,
    "prompt_logprobs": WHOLE,
    "allowed_token_ids": TOKEN_IDS,
    "bad_words": TEXTS,
    "structured_outputs": OBJECT,
}
META: dict[str, Check] = {  # ours, for the scheduler
    "client": TEXT,
    "program": TEXT,
    "parents": TEXTS,
    "priority": NUMBER,
    "deadline_ms": NUMBER,
    "stage": TEXT,
}
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # for the caller's books: they change no answer
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),  # without tools it says nothing
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "dimensions": (),
    "continue_final_message": (False,),
}


def check_fields(body: Mapping[str, Any], fields: Mapping[str, "Check"]) -> None:
    """Each key known, of the right type, and, where we do not implement it, at the value that changes nothing."""
    for key, value in body.items():
        if key in LABELS:
            continue
        if key in NEUTRAL and key not in fields:
            if value not in NEUTRAL[key]:
                raise LineError(f"{key}={json.dumps(value)[:60]} is not supported", code="unsupported_field", param=key)
            continue
        if key not in fields:
            hint = nearest(key, [*fields, *NEUTRAL])
            meant = f"; did you mean {hint!r}?" if hint else ""
            raise LineError(f"unknown field {key!r} in body{meant}", code="unknown_field", param=key)
        is_right, wanted = fields[key]
        if not is_right(value):
            raise LineError(f"{key} must be {wanted}, not {kind(value)}", param=key)
