"""Fields that OpenAI's bodies share, vLLM's extra ones and ours: each is obeyed, or refused by name."""

import json
import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from jaxserve.config import nearest
from jaxserve.errors import JaxserveError
from jaxserve.openai.errors import ApiError
from jaxserve.request import SamplingParams

# For the caller's own books: they change no answer.
LABELS = frozenset(("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"))
# Known elsewhere and not obeyed here: refused, unless the value asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "mm_processor_kwargs": ({},),
    "documents": ([],),
    "verbosity": ("medium",),
    "prediction": (),
    "audio": (),
    "web_search_options": (),
    "lora_request": (),
}

Ids = list[int]


def _finite_inside(value: dict[str, Any]) -> dict[str, Any]:
    """Python reads NaN and numbers beyond float64, but JSON cannot tell them again."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError("it holds a number that is not finite") from None
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_finite_inside)]  # of any content
Seconds = float


class Body(BaseModel):
    """A JSON object. A field that is null counts as left out; an unknown one is refused, with the nearest known one."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())
    neutral: ClassVar[
        Mapping[str, tuple[Any, ...]]
    ] = {}  # fields that are taken only with a value that asks for nothing

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value  # pydantic says what is wrong
        # Looked up once: it is slow.
        fields, kept = {field.alias or name for name, field in cls.model_fields.items()}, dict[str, Any]()
        for key, item in value.items():
            if item is None or (key in LABELS and cls.neutral and key not in fields):
                continue
            if key in fields:
                kept[key] = item
            elif key in cls.neutral:
                if item not in cls.neutral[key]:
                    raise _fault(f"{key}={json.dumps(item)[:60]} is not supported", key, "unsupported_field")
            else:
                near = nearest(key, [*fields, *cls.neutral])
                raise _fault(
                    f"unknown field {key[:60]!r}" + (f"; did you mean {near!r}?" if near else ""), key, "unknown_field"
                )
        return kept


def _fault(message: str, param: str, code: str | None) -> PydanticCustomError:
    # A message is a template: braces in it would be taken for places.
    return PydanticCustomError("jaxserve", "{message}", {"message": message, "param": param[:60], "code": code})  # type: ignore[arg-type]


class SamplingFields(Body):
    """How tokens are chosen: OpenAI's fields and vLLM's, under the names of `SamplingParams`."""

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: Ids | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: JsonObject | None = None

    def sampling_params(self, *, called: Mapping[str, str] = MappingProxyType({}), **more: Any) -> SamplingParams:
        """The sampling options of the body, with some replaced. `called`: fields that have other names in this body.

        Raises:
          ApiError: one is out of range; it is named.
        """
        options = {name: getattr(self, name) for name in self.model_fields_set & _SAMPLING} | more
        options = {name: value for name, value in options.items() if value is not None}
        if "max_tokens" in more:  # None there means: as long as the context allows
            options["max_tokens"] = more["max_tokens"]
        try:
            return SamplingParams(**options)
        except JaxserveError as error:
            text = str(error)
            found = re.search(rf"\b({'|'.join(options)})\b", text) if options else None
            if found is None:
                raise ApiError(text) from None
            name = called.get(found[0], found[0])
            raise ApiError(text[: found.start()] + name + text[found.end() :], param=name) from None


_SAMPLING = frozenset(SamplingFields.model_fields)


class MetaFields(Body):
    """What a body says to the scheduler. `cache_salt` (vLLM's) keeps its prefix cache apart from everybody else's."""

    client: str | None = None
    program: str | None = None
    parents: list[str] | None = None
    stage: str | None = None
    priority: float | None = None
    deadline_ms: Annotated[float, Field(gt=0)] | None = None
    cache_salt: str | None = None

    def meta(self) -> dict[str, Any]:
        """The same under the names of `Request`."""
        if not self.model_fields_set & _META:
            return {}
        found = {name: getattr(self, name) for name in ("client", "program", "stage", "priority")}
        found["parents"] = None if self.parents is None else tuple(self.parents)
        found["deadline_s"] = None if self.deadline_ms is None else self.deadline_ms / 1000
        found["namespace"] = self.cache_salt
        return {name: value for name, value in found.items() if value is not None}


_META = frozenset(MetaFields.model_fields)


class StreamOptions(Body):
    """What a stream tells besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: usage so far with every chunk


class StreamFields(Body):
    """Whether an answer comes as a stream."""

    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_are_for_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _fault("stream_options are for streams; send stream: true with them", "stream_options", None)
        return self

    @property
    def with_usage(self) -> bool:
        """Whether the last chunk tells the usage of all."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def with_counts(self) -> bool:
        """Whether every chunk tells the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


def finite(value: float) -> float:
    """JSON has no infinity."""
    return max(value, -9999.0) if math.isfinite(value) or value < 0 else 9999.0
