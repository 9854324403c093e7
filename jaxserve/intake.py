"""Prompts and options as callers give them -> Requests that the engine takes. Nothing runs here, any thread may call it."""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxserve.errors import RequestError
from jaxserve.output import RequestOutput, Score
from jaxserve.request import Request, SamplingParams, Task
from jaxserve.sampling.grammar import Grammars
from jaxserve.structured import Grammar, StructuredOutputsParams
from jaxserve.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]

_META = ("priority", "client", "program", "parents", "stage", "deadline_s", "pin", "pin_tokens", "namespace")


class Intake:
    """What stands before an engine."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
        check: Callable[[Request], None],
        *,
        vocab_size: int,
    ):
        """`eos_token_ids`: the model's own; without any the tokenizer's is taken. `check` raises RequestError for what can
        never be served."""
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        if not eos_token_ids and tokenizer is not None and tokenizer.eos_token_id is not None:
            self._eos_token_ids = (tokenizer.eos_token_id,)
        self._check = check
        # Of who stands before it: each may change or refuse requests.
        self.reviews: list[Callable[[Request], Request]] = []
        self._grammars = None if tokenizer is None else Grammars(tokenizer.as_json, vocab_size, self._eos_token_ids)
        self._ids = itertools.count()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
          RequestError: the model's folder has none; prompts must be token ids then.
        """
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer.json", remedy="Give prompts as token ids")
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether prompts may be text."""
        return self._tokenizer is not None

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        task: Task = Task.GENERATE,
        logprobs_from: int | None = None,
        meta: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> tuple[Request, str | None]:
        """A request, and the text of its prompt where that is known. Compiling its grammar may take seconds.

        Raises:
          RequestError: it can never be served.
          UnavailableError: too many grammars wait to be compiled.
        """
        text, ids = self.tokens(prompt)
        if logprobs_from is None and params.prompt_logprobs is not None:
            logprobs_from = 1
        request = Request(
            request_id=f"request-{next(self._ids)}" if request_id is None else request_id,
            prompt_token_ids=ids,
            params=params,
            task=task,
            eos_token_ids=self._eos_token_ids,
            bad_word_ids=self._bad_words(params),
            logprobs_from=logprobs_from,
            **_checked_meta(meta),
        )
        if params.stop:
            self.tokenizer  # noqa: B018  stop strings need text
        for review in self.reviews:
            request = review(request)
        self._check(request)
        if params.structured_outputs is not None and task is Task.GENERATE:
            request = dataclasses.replace(request, grammar=self._grammar(params.structured_outputs, request.client))
        return request, text

    def score_request(
        self,
        prompt: Prompt,
        continuation: Prompt,
        *,
        meta: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> tuple[Request, str | None]:
        """A request for the log-probability of `continuation` after `prompt`; `score_of` reads its answer."""
        if isinstance(prompt, str) and isinstance(continuation, str):
            stripped = prompt.rstrip()
            continuation = prompt[len(stripped) :] + continuation
            whole = tuple(self.tokenizer.encode(stripped + continuation))
            start = len(self.tokenizer.encode(stripped)) if stripped else 1
        else:
            (_, head), (_, tail) = self.tokens(prompt), self.tokens(continuation)
            whole, start = head + tail, len(head)
        if not 1 <= start < len(whole):
            raise RequestError("score needs at least one token before and one in each continuation")
        params = SamplingParams(temperature=0.0, prompt_logprobs=1)
        options: dict[str, Any] = {"task": Task.SCORE, "logprobs_from": start, "meta": meta, "request_id": request_id}
        return self.request(whole, params, **options)

    def embed_request(
        self, prompt: Prompt, *, meta: Mapping[str, Any] | None = None, request_id: str | None = None
    ) -> tuple[Request, str | None]:
        """A request for the last hidden state of a prompt; `vectors_of` reads its answer."""
        params = SamplingParams(temperature=0.0)
        return self.request(prompt, params, task=Task.EMBED, meta=meta, request_id=request_id)

    def chat_prompt(self, messages: Any, /, **variables: Any) -> dict[str, Any]:
        """A conversation as a prompt."""
        text = self.tokenizer.apply_chat_template(messages, **variables)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return {"prompt": text, "prompt_token_ids": ids}

    def tokens(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...]]:
        """The text of a prompt, where it is known, and its token ids."""
        text = None
        if isinstance(prompt, Mapping):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            prompt = ids if ids is not None else "" if text is None else text
        if isinstance(prompt, str):
            return prompt, tuple(self.tokenizer.encode(prompt))
        try:
            ids = tuple(operator.index(i) for i in prompt)  # pyright: ignore[reportArgumentType]  checked by `index`
        except TypeError:
            raise RequestError(f"a prompt must be text or whole-number token ids, not {prompt!r:.80}") from None
        return text, ids

    def _grammar(self, wanted: StructuredOutputsParams, client: str) -> Grammar:
        if self._grammars is None:
            raise RequestError("this model has no tokenizer.json, so structured_outputs cannot be followed")
        return self._grammars.compile(wanted, client)

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each word as it is written at the start of a text and after a space."""
        spellings = [spelling for word in params.bad_words for spelling in (word, " " + word.lstrip())]
        return tuple(dict.fromkeys(tuple(self.tokenizer.encode(s, add_special_tokens=False)) for s in spellings))


def score_of(request: Request, output: RequestOutput) -> Score:
    """The score that a `score_request` asked for."""
    assert request.logprobs_from is not None and output.prompt_logprobs is not None
    ids = request.prompt_token_ids[request.logprobs_from :]
    tables = output.prompt_logprobs[request.logprobs_from :]
    found = [table[token] for token, table in zip(ids, tables, strict=True) if table is not None]
    values = tuple(f.logprob for f in found)
    return Score(sum(values), values, ids, all(f.rank == 1 for f in found))


def vectors_of(outputs: Sequence[RequestOutput], *, normalize: bool = True) -> np.ndarray:
    """What `embed_request`s asked for: float32[n, e], each of length 1 if wanted."""
    if not outputs:
        return np.zeros((0, 0), np.float32)
    vectors = np.stack([output.hidden for output in outputs if output.hidden is not None])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors


def _checked_meta(meta: Mapping[str, Any] | None) -> dict[str, Any]:
    unknown = set(meta or ()) - set(_META)
    if unknown:
        raise RequestError(f"unknown request field {sorted(unknown)[0]!r}", remedy=f"Known: {', '.join(_META)}")
    return dict(meta or {})
