"""What a caller wants: sampling options and requests. Host-only values, checked when they are made.

Index regions of a sequence, used by the scheduler, the KV store and the executor alike:

    0            num_cached        num_computed              num_known    num_known + num_pending
    |  from cache  |  computed here  |  scheduled next (n)  ...  |  sampled, not yet on the host  |
    |<------------- keys and values in blocks ---------------->|
"""

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxserve.config import names_unknown_options
from jaxserve.errors import ConfigError, RequestError
from jaxserve.structured import Grammar, structured_outputs

MAX_LOGPROBS = 20  # most alternatives per token; the width of the device's output
MAX_STOP_CHARACTERS = 4096  # of all stop strings together: the end of a text is held against them at every token
MAX_BANNED = 64  # most tokens held back at one step by min_tokens and multi-token bad words


class Finish(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # an end token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"
    ERROR = "error"  # a step failed on the device, or the answer's grammar became too costly to follow


class Task(enum.StrEnum):
    """What is computed for a request."""

    GENERATE = "generate"
    SCORE = "score"  # log-probabilities of the prompt from `logprobs_from` on, no new token
    EMBED = "embed"  # the last hidden state of the prompt


@names_unknown_options
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens. vLLM's fields and defaults.

    `prompt_logprobs` and `logprobs` count alternatives per token and are taken from the model's raw logits, before
    temperature, penalties and masks.

    `structured_outputs` (`StructuredOutputsParams`, or the same as a mapping) comes before all else: where `min_tokens`,
    `bad_words`, `allowed_token_ids` or `ignore_eos` leave nothing that its grammar allows, they give way for that token.
    Temperature, penalties and `logit_bias` choose among the tokens that it allows.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()  # or one string, or None
    stop_token_ids: Sequence[int] = ()  # or None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()  # or one string, or None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: Any = None  # or a StructuredOutputsParams

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            _check_number(name, getattr(self, name), low, high)
        for name, low in (("n", 1), ("top_k", -1), ("min_tokens", 0)):
            _check_int(name, getattr(self, name), low)
        for name, low in (("max_tokens", 1), ("logprobs", 0), ("prompt_logprobs", 0)):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), low)
        if self.seed is not None:
            _check_int("seed", self.seed, -(1 << 63))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _check_flag(name, getattr(self, name))
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > MAX_LOGPROBS:
                raise ConfigError(f"{name}={getattr(self, name)} must be at most {MAX_LOGPROBS}")
        if self.n > 1024:
            raise ConfigError(f"n={self.n} must be at most 1024")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        num_stop = sum(map(len, self.stop))
        if num_stop > MAX_STOP_CHARACTERS:
            raise ConfigError(f"stop holds {num_stop} characters; at most {MAX_STOP_CHARACTERS} are supported")
        object.__setattr__(self, "bad_words", _strings("bad_words", self.bad_words))
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids) or ())
        object.__setattr__(self, "allowed_token_ids", _ids("allowed_token_ids", self.allowed_token_ids))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ConfigError("allowed_token_ids is empty, so no token could ever be chosen")
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        object.__setattr__(self, "structured_outputs", structured_outputs(self.structured_outputs))

    @property
    def has_edits(self) -> bool:
        """Whether logits of this request are changed by state kept on the device (penalties, bias, allowed ids)."""
        penalised = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(penalised or self.logit_bias or self.allowed_token_ids is not None)


_LARGEST = 3e38  # of float32, which the device computes in
_RANGES = (
    ("temperature", 0.0, math.inf),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.0, math.inf),
)


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if good and name in ("top_p", "repetition_penalty"):
        good = value > 0
    if not good or not low <= value <= high:
        bound = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        more = " and above 0" if name in ("top_p", "repetition_penalty") else ""
        raise ConfigError(f"{name}={_shown(value)} must be a finite number {bound}{more}")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={_shown(value)} must be True or False")


def _shown(value: Any) -> str:
    return f"about 2**{value.bit_length()}" if isinstance(value, int) and value.bit_length() > 256 else f"{value!r:.80}"


def _check_int(name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 1 << 63:
        raise ConfigError(f"{name}={_shown(value)} must be a whole number of at least {low} that fits 64 bits")


def _strings(name: str, value: Any) -> tuple[str, ...]:
    values = () if value is None else (value,) if isinstance(value, str) else _listed(value)
    if values is None or not all(isinstance(v, str) and v for v in values):
        raise ConfigError(f"{name} must hold non-empty strings, not {_shown(value)}")
    return values


def _ids(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    values = None if isinstance(value, (str, bytes)) else _listed(value)
    if values is None or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise ConfigError(f"{name} must hold token ids, not {_shown(value)}")
    return values


def _listed(value: Any) -> tuple[Any, ...] | None:
    return tuple(value) if isinstance(value, Iterable) else None


def _bias(value: Any) -> dict[int, float] | None:
    if not value:
        return None
    try:
        bias = {int(str(token)): float(amount) for token, amount in dict(value).items()}
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"logit_bias must map token ids to numbers, not {_shown(value)}") from None
    if not all(math.isfinite(amount) and token >= 0 for token, amount in bias.items()):
        raise ConfigError("logit_bias must map token ids to finite numbers")
    return bias


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt and what to do with it. Token ids only: text is turned into ids before, and back after.

    `namespace` separates prefix caches (tenant, adapter, weights). The fields from `priority` on are for scheduling
    policies; those that know nothing of a field ignore it.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    task: Task = Task.GENERATE
    arrival_s: float = 0.0
    eos_token_ids: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    logprobs_from: int | None = None  # first prompt position whose log-probability is wanted
    grammar: Grammar | None = dataclasses.field(default=None, compare=False, repr=False)  # of `structured_outputs`
    namespace: str = ""
    priority: float = 0  # smaller goes first
    client: str = ""  # who pays: for fairness, quotas and accounts
    program: str = ""  # what it is a part of: an agent's run, a conversation
    parents: tuple[str, ...] = ()  # request ids of the same program whose answers it was made from
    stage: str = ""  # which step of the program's workflow it is
    deadline_s: float | None = None  # seconds from the program's first arrival (without one: its own) to its answer
    pin: str = ""  # a name under which its first `pin_tokens` stay cached until that is unpinned
    pin_tokens: int = 0


def check_priority(priority: Any) -> None:
    """Raise RequestError if a priority has no place in an order."""
    if not isinstance(priority, (int, float)) or priority != priority:
        raise RequestError(f"priority={priority!r:.40} must be a number; smaller goes first")


def check_meta(request: Request) -> None:
    """Refuse what scheduling policies could not use.

    Raises:
      RequestError: a name that is no text, a priority or deadline that is no number, or a pin without tokens.
    """
    check_priority(request.priority)
    for name in ("client", "program", "stage", "pin", "namespace"):
        if not isinstance(getattr(request, name), str):
            raise RequestError(f"{name}={getattr(request, name)!r:.60} must be a text")
    parents = None if isinstance(request.parents, str) else _listed(request.parents)
    if parents is None or not all(isinstance(parent, str) for parent in parents):
        raise RequestError(f"parents={request.parents!r:.60} must be a list of request ids")
    deadline = request.deadline_s
    is_number = isinstance(deadline, (int, float)) and not isinstance(deadline, bool)
    if deadline is not None and not (is_number and deadline >= 0):  # NaN is not, either
        raise RequestError(f"deadline_s={deadline!r:.40} must be a number of seconds, 0 or more")
    pinned = request.pin_tokens
    if not isinstance(pinned, int) or isinstance(pinned, bool) or pinned < 0:
        raise RequestError(f"pin_tokens={pinned!r:.40} must be a whole number, 0 or more")
    if pinned > len(request.prompt_token_ids) or (pinned and not request.pin):
        raise RequestError(f"pin_tokens={pinned} needs a name (pin) and a prompt of at least so many tokens")


def check_tokens(request: Request, vocab_size: int, max_model_len: int) -> None:
    """Refuse what can never be served, before it reaches the scheduler.

    Raises:
      RequestError: no token, an id outside the vocabulary, too long, or options that name ids outside the vocabulary.
    """
    ids = request.prompt_token_ids
    if not ids:
        raise RequestError("the prompt is empty", remedy="Give at least one token")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        raise RequestError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
    needed = len(ids) + (1 if request.task is Task.GENERATE else 0)
    if needed > max_model_len:
        raise RequestError(
            f"the prompt has {len(ids)} tokens, and max_model_len={max_model_len} must also hold the answer",
            remedy="Shorten the prompt or raise max_model_len",
        )
    params = request.params
    named = (*params.stop_token_ids, *(params.allowed_token_ids or ()), *(params.logit_bias or ()))
    if named and max(named) >= vocab_size:
        raise RequestError(f"sampling options name token id {max(named)}, outside the vocabulary of {vocab_size}")
    held_back = len(request.eos_token_ids) + len(params.stop_token_ids) + len(request.bad_word_ids)
    if not all(request.bad_word_ids):
        raise RequestError("a bad word has no tokens, so it cannot be held back")
    check_meta(request)
    if held_back > MAX_BANNED:
        raise RequestError(f"{held_back} stop tokens and bad words together; at most {MAX_BANNED} are supported")
