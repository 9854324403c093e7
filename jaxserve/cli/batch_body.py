"""Lines of an OpenAI batch file -> jobs. Every field is obeyed, or refused by name; nothing is dropped in silence."""

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from jaxserve.cli.batch_schema import (
    ANY,
    BOOLEAN,
    META,
    OBJECT,
    SAMPLING,
    TEXT,
    WHOLE,
    Check,
    LineError,
    are_whole,
    check_fields,
    is_number,
    kind,
)
from jaxserve.errors import JaxserveError
from jaxserve.request import SamplingParams

Prompt = str | list[int] | Mapping[str, Any]  # the last has been planned: "prompt" (or None), "prompt_token_ids"


class Pin(NamedTuple):
    """The group of prompts that a prompt begins like."""

    name: str
    num_tokens: int  # that they share
    num_members: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One request line, understood. `prompts` for completions and embeddings, `messages` for chat,
    which has both once it has been planned."""

    custom_id: str
    url: str
    model: str
    prompts: tuple[Prompt, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    echo: bool = False
    prompt_only: bool = False  # echo with max_tokens 0: the prompt is scored, nothing is added to it
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # options of the chat template
    base64: bool = False  # embeddings as base64 of little-endian float32
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the scheduler: fields of `Request`
    pins: tuple[Pin | None, ...] = ()  # of each prompt, once it has been planned


Item = tuple[int, str | None, Job | LineError]  # line number, custom_id, what to do or what is wrong


def parse_line(line: str) -> tuple[str, dict[str, Any]]:
    """(custom_id, the whole object) of a line; everything else is `parse_job`'s."""
    try:
        raw = json.loads(line)
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise LineError("holds half of a surrogate pair, which is not text", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise LineError(f"not JSON: {error.msg} at character {error.pos}", code="invalid_json") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise LineError(f"JSON that cannot be read: {error}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise LineError(f"a line must be a JSON object, not {kind(raw)}", code="invalid_json")
    custom_id = raw.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise LineError("custom_id is missing or is not a text", code="missing_custom_id", param="custom_id")
    return custom_id, raw


def parse_job(raw: Mapping[str, Any], served: Collection[str]) -> Job:
    """Check a line's url and body against the OpenAI schema.

    Raises:
      LineError: with the field at fault.
    """
    unknown = [key for key in raw if key not in ("custom_id", "method", "url", "body")]
    if unknown:
        raise LineError(f"unknown field {unknown[0]!r} beside custom_id, method, url and body", param=unknown[0])
    if raw.get("method", "POST") != "POST":
        raise LineError(f"method must be 'POST', not {raw['method']!r}", param="method")
    url, body = raw.get("url"), raw.get("body")
    if not isinstance(url, str) or url not in ENDPOINTS:
        raise LineError(
            f"url {url!r} is not supported; there are {', '.join(ENDPOINTS)}",
            code="invalid_url",
            param="url",
            status=404,
        )
    if not isinstance(body, dict):
        raise LineError(f"body must be a JSON object, not {kind(body)}", param="body")
    read, fields = ENDPOINTS[url]
    body = {key: value for key, value in body.items() if value is not None}  # null means default
    check_fields(body, fields)
    model = body.get("model", next(iter(served)))
    if model not in served:
        names = ", ".join(map(repr, served))
        raise LineError(
            f"model {model!r} is not served by this run, which serves {names}; --served-model-name adds a name",
            code="model_not_found",
            param="model",
            status=404,
        )
    job = read(raw["custom_id"], url, model, body)
    return dataclasses.replace(job, meta=_meta(body))


def _read_completion(custom_id: str, url: str, model: str, body: dict[str, Any]) -> Job:
    if "prompt" not in body:
        raise LineError("prompt is missing", param="prompt")
    options = {"max_tokens": 16} | _sampling(body)
    echo = body.get("echo", False)
    if echo and "logprobs" in options:
        options.setdefault("prompt_logprobs", options["logprobs"])
    prompt_only = bool(echo) and options["max_tokens"] == 0
    if prompt_only:
        options["max_tokens"] = 1  # computed, then left out
    if body.get("best_of", options.get("n", 1)) != options.get("n", 1):
        raise LineError("best_of other than n is not supported", param="best_of")
    prompts = _prompts(body["prompt"], "prompt")
    return Job(
        custom_id=custom_id,
        url=url,
        model=model,
        prompts=prompts,
        params=_params(options),
        echo=echo,
        prompt_only=prompt_only,
    )


def _read_chat(custom_id: str, url: str, model: str, body: dict[str, Any]) -> Job:
    options = _sampling({key: value for key, value in body.items() if key not in ("logprobs", "top_logprobs")})
    limits = {body[key] for key in ("max_tokens", "max_completion_tokens") if key in body}
    if len(limits) > 1:
        raise LineError("max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens")
    options["max_tokens"] = next(iter(limits), None)  # None: until the model ends or the context is full
    if "top_logprobs" in body and not body.get("logprobs"):
        raise LineError("top_logprobs needs logprobs: true", param="top_logprobs")
    if body.get("logprobs"):
        options["logprobs"] = body.get("top_logprobs", 0)
    template = dict(body.get("chat_template_kwargs", {}))
    taken = {"messages", "tools", "documents", "add_generation_prompt"} & set(template)
    if taken:
        raise LineError(f"chat_template_kwargs must not set {min(taken)}", param="chat_template_kwargs")
    if "add_generation_prompt" in body:
        template["add_generation_prompt"] = body["add_generation_prompt"]
    return Job(
        custom_id=custom_id,
        url=url,
        model=model,
        messages=_messages(body.get("messages")),
        params=_params(options),
        template=template,
    )


def _read_embedding(custom_id: str, url: str, model: str, body: dict[str, Any]) -> Job:
    if "input" not in body:
        raise LineError("input is missing", param="input")
    form = body.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise LineError(f"encoding_format must be 'float' or 'base64', not {form!r}", param="encoding_format")
    prompts = _prompts(body["input"], "input")
    return Job(custom_id=custom_id, url=url, model=model, prompts=prompts, base64=form == "base64")


def _meta(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a body says to the scheduler, under the names of `Request`."""
    meta = {key: body[key] for key in META if key in body and key != "deadline_ms"}
    if "parents" in meta:
        meta["parents"] = tuple(meta["parents"])
    if "deadline_ms" in body:
        if not 0 < body["deadline_ms"] < math.inf:
            raise LineError("deadline_ms must be above 0", param="deadline_ms")
        meta["deadline_s"] = body["deadline_ms"] / 1000
    if not math.isfinite(meta.get("priority", 0)):
        raise LineError("priority must be a finite number", param="priority")
    return meta


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling options of a body under the names of `SamplingParams`."""
    options = {key: body[key] for key in SAMPLING if key in body}
    if "logit_bias" in options:
        bias = options["logit_bias"]
        if not all(key.isdecimal() and is_number(value) for key, value in bias.items()):
            raise LineError("logit_bias must map token ids to numbers", param="logit_bias")
        options["logit_bias"] = {int(key): value for key, value in bias.items()}
    return options


def _params(options: dict[str, Any]) -> SamplingParams:
    try:
        return SamplingParams(**options)
    except JaxserveError as error:
        param = next((name for name in options if name in str(error)), None)
        raise LineError(str(error), param=param) from None


def _prompts(value: Any, param: str) -> tuple[Prompt, ...]:
    """A text, a list of texts, token ids, or a list of token id lists."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if are_whole(value):
            return (value,)
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) and item and are_whole(item) for item in value):
            return tuple(value)
    raise LineError(f"{param} must be a text, a list of texts, token ids, or a list of token id lists", param=param)


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise LineError("messages must be a list with at least one message", param="messages")
    return tuple(_message(message, f"messages[{index}]") for index, message in enumerate(value))


def _message(message: Any, where: str) -> dict[str, Any]:
    """A message with its content as one text; only text parts are understood."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise LineError(f"{where} must be an object with a role and a content", param=where)
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise LineError(f"{where}.content: only parts of type 'text' are supported", param=where)
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise LineError(f"{where}.content must be a text or a list of text parts", param=where)
    unknown = [key for key in message if key not in ("role", "content", "name") and message[key] is not None]
    if unknown:
        raise LineError(f"{where}.{unknown[0]} is not supported", param=where)
    return {key: value for key, value in message.items() if value is not None} | {"content": content}


CHAT = {
    "messages": ANY,
    "max_completion_tokens": WHOLE,
    "logprobs": BOOLEAN,
    "top_logprobs": WHOLE,
    "add_generation_prompt": BOOLEAN,
    "chat_template_kwargs": OBJECT,
}
_SHARED = {"model": TEXT} | META
ENDPOINTS: dict[str, tuple[Callable[[str, str, str, dict[str, Any]], Job], dict[str, Check]]] = {
    "/v1/completions": (
        _read_completion,
        SAMPLING | _SHARED | {"prompt": ANY, "echo": BOOLEAN, "best_of": WHOLE},
    ),
    "/v1/chat/completions": (_read_chat, SAMPLING | _SHARED | CHAT),
    "/v1/embeddings": (_read_embedding, _SHARED | {"input": ANY, "encoding_format": TEXT}),
}
