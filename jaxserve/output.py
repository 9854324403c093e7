"""What callers get back: whole answers, and the pieces they arrive in. vLLM's names."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token at one position; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclasses.dataclass(slots=True)
class CompletionOutput:
    """One answer. `logprobs[i]` maps token ids to Logprob at answer position i, the chosen one included."""

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop token or stop string that ended it
    error: str | None = None  # why this answer alone ended with finish_reason "error"


@dataclasses.dataclass(slots=True)
class RequestMetrics:
    """When things happened (seconds of one clock), and what was saved or lost."""

    arrival_s: float
    started_s: float | None = None  # it got its first blocks; until then it was queued
    first_token_s: float | None = None
    finished_s: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """A request and its answers. `prompt_logprobs[0]` is None: nothing precedes the first token."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = False
    hidden: np.ndarray | None = None  # f32[e]; last hidden state, for embeddings
    error: str | None = None  # what went wrong on the device, where all finish_reasons are "error"


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """News of one answer: text and tokens since the last event; `finish_reason` with the last one.

    `output` is the whole request, growing until `output.finished`.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    output: RequestOutput


@dataclasses.dataclass(frozen=True, slots=True)
class Score:
    """Log-probability of a continuation: its sum, per token, and whether greedy decoding would have chosen it."""

    logprob: float
    token_logprobs: tuple[float, ...]
    token_ids: tuple[int, ...]
    is_greedy: bool
