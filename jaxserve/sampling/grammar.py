"""Grammars that answers must follow, through `llguidance`: compiled from what users give, then asked before every token
which ones may come next.

Compiling may take seconds and has a thread of its own, where clients take turns. A `Guide` is asked by the engine's thread
in every step, so what it may cost is bounded, and whoever costs more ends.
"""

import dataclasses
import json
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, TypeVar

from llguidance import LLMatcher, LLTokenizer

from jaxserve.errors import RequestError, UnavailableError
from jaxserve.sampling.trial import Trials, limits
from jaxserve.structured import StructuredOutputsParams

T = TypeVar("T")

_KEPT = 64  # grammars
_MOST_OF_CLIENT, _MOST_WAITING = 256, 1024  # grammars that are to be compiled
_FREE_S = 2.0  # CPU time that an answer's masks may take in all, beside what each token may
_TOKEN_S = 0.01

_WAITS = ContextVar("waits", default=True)


_Made = Future["Compiled | RequestError"]


class Compiling(Exception):  # noqa: N818  nothing is wrong
    """A grammar is not there yet; when `done` is, ask again."""

    def __init__(self, done: _Made):
        super().__init__("a grammar is being compiled")
        self.done = done


def without_waiting(work: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call `work`. If it needs a grammar that has to be compiled first, Compiling is raised, and no thread waits for it:
    there are few, and others need them."""
    token = _WAITS.set(False)
    try:
        return work(*args, **options)
    finally:
        _WAITS.reset(token)


class Grammars:
    """The grammars of one model, compiled one after the other in a thread of their own. Any thread may ask.

    Clients take turns: who sends many, or costly ones, keeps himself waiting, and each other client for one of them.
    """

    def __init__(self, tokenizer_json: Callable[[], str], vocab_size: int, eos_token_ids: tuple[int, ...]):
        """`tokenizer_json`: the text of the model's `tokenizer.json`, asked for when it is needed first."""
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokens: _Tokens | None = None
        self._compiler = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jaxserve-grammar")
        self._lock = threading.Lock()
        # Least recently used first; those that were refused, too: to be sent again must not cost the same again.
        self._kept: OrderedDict[StructuredOutputsParams, _Made] = OrderedDict()
        self._waiting: OrderedDict[str, deque[tuple[StructuredOutputsParams, _Made]]] = (
            OrderedDict()
        )  # next client first

    def compile(self, params: StructuredOutputsParams, client: str = "") -> "Compiled":
        """The grammar of what was asked for; one that was compiled before costs nothing.

        Raises:
          RequestError: it is no schema, expression or grammar, uses what is not supported, or is too costly.
          UnavailableError: too many wait to be compiled.
          Compiling: it is not there yet, and the caller does not wait (`without_waiting`).
        """
        with self._lock:
            made = self._kept.pop(params, None) or self._queued(params, client)
            self._kept[params] = made
        if not made.done() and not _WAITS.get():
            raise Compiling(made)
        found = made.result()
        if isinstance(found, RequestError):
            raise RequestError(str(found))  # a new one: each that is raised keeps hold of where
        return found

    def _queued(self, params: StructuredOutputsParams, client: str) -> "_Made":
        mine = len(self._waiting.get(client, ()))
        if mine >= _MOST_OF_CLIENT or sum(map(len, self._waiting.values())) >= _MOST_WAITING:
            raise UnavailableError("too many grammars wait to be compiled", remedy="Try again later")
        made = _Made()
        self._waiting.setdefault(client, deque()).append((params, made))
        self._compiler.submit(self._next)
        return made

    def _next(self) -> None:
        """Compile a grammar of the client whose turn it is."""
        with self._lock:
            client, waiting = self._waiting.popitem(last=False)
            params, made = waiting.popleft()
            if waiting:
                self._waiting[client] = waiting
        try:
            found = self._compile(params)
        except BaseException as error:  # noqa: BLE001  no fault of the grammar's, such as a process that cannot be started
            with self._lock:
                del self._kept[params]
            made.set_exception(error)
            return
        with self._lock:  # before others, whose turn is later: who waits for this one asks again
            self._kept.move_to_end(params)
            done = [each for each, its in self._kept.items() if its.done()]
            for each in done[: max(0, 1 + len(done) - _KEPT)]:
                del self._kept[each]
        made.set_result(found)

    def _compile(self, params: StructuredOutputsParams) -> "Compiled | RequestError":
        try:
            if self._tokens is None:
                self._tokens = _tokens(self._tokenizer_json(), self._vocab_size, self._eos_token_ids)
            return _compile(params, self._tokens)
        except RequestError as refusal:
            return refusal.with_traceback(None)


@dataclasses.dataclass(frozen=True, slots=True)
class _Tokens:
    """What is known of a tokenizer."""

    table: LLTokenizer
    num_bytes: int  # of a mask
    only_ends: bytes  # the mask of the end tokens
    trials: Trials


class Compiled:
    """A grammar, ready to steer any number of answers."""

    def __init__(self, first: LLMatcher, mask: bytes, tokens: _Tokens):
        self._first, self._mask, self._tokens = first, mask, tokens

    def start(self) -> "Guide":
        """See `structured.Grammar`."""
        return Guide(self._first.deep_copy(), self._mask, self._tokens)


class Guide:
    """See `structured.Guide`."""

    __slots__ = ("_left_s", "_mask", "_matcher", "_tokens", "error", "is_done")

    def __init__(self, matcher: LLMatcher, mask: bytes, tokens: _Tokens):
        self._matcher, self._mask, self._tokens = matcher, mask, tokens
        self._left_s = _FREE_S
        self.is_done = False
        self.error = ""

    def mask(self) -> bytes:
        """See `structured.Guide`."""
        return self._mask

    def advance(self, token_id: int) -> None:
        """See `structured.Guide`. What may come next is found at once, while the device is busy with others."""
        started_s = time.thread_time()
        self._matcher.consume_token(token_id)
        if not self._matcher.is_stopped():
            self._mask = self._matcher.compute_bitmask()[: self._tokens.num_bytes]
        self._left_s -= time.thread_time() - started_s - _TOKEN_S
        if self._matcher.is_error():
            self.error = f"its grammar could not be followed: {_reason(self._matcher.get_error())}"
        elif self._matcher.is_stopped() or self._mask == self._tokens.only_ends:
            self.is_done = True
        elif self._left_s < 0:
            self.error = "its grammar takes too long to follow; make it simpler"


def _compile(params: StructuredOutputsParams, tokens: _Tokens) -> Compiled:
    try:
        grammar = tokens.trials.run(*_asked(params))
    except ValueError as error:
        raise RequestError(f"structured_outputs.{params.kind} cannot be used: {_reason(str(error))}") from None
    matcher = LLMatcher(tokens.table, grammar, log_level=0, limits=limits())
    mask = matcher.compute_bitmask()[: tokens.num_bytes]
    if matcher.is_error():  # what was tried has changed since, or the trial was no good
        raise RequestError(f"structured_outputs.{params.kind} cannot be used: {_reason(matcher.get_error())}")
    return Compiled(matcher, mask, tokens)


def _asked(params: StructuredOutputsParams) -> tuple[str, str]:
    """A form that `llguidance.grammar_from` knows, and a text in it."""
    if params.grammar is not None:
        return "grammar", params.grammar  # Lark's or GBNF's
    if params.regex is not None:
        return "regex", params.regex
    if params.choice is not None:
        return "lark", "start: " + " | ".join(_quoted(choice) for choice in params.choice)
    schema = params.json or '{"type": "object"}'
    if params.disable_any_whitespace:
        return "llguidance", LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
    if params.whitespace_pattern is not None:
        pattern = params.whitespace_pattern
        return "llguidance", LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": pattern})
    return "json_schema", schema


def _quoted(text: str) -> str:
    """A text as Lark writes it."""
    return re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def _reason(text: str) -> str:
    """The library's message in one sentence."""
    if text.startswith("NoExtension"):
        return "no answer satisfies it"
    if text.startswith("panic"):
        return "it is too large"
    lines = [line.strip() for line in text.split("<state>")[0].split("\n") if line.strip()]
    wanted = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    return (wanted or (lines[0] if lines else "it is not understood"))[:300].rstrip(". ")


def _tokens(tokenizer_json: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> _Tokens:
    if not eos_token_ids:
        raise RequestError("this model has no end token, so structured_outputs cannot be followed")
    try:
        table = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except ValueError as error:
        raise RequestError(f"structured_outputs cannot be used with this model's tokenizer: {error}") from None
    only_ends = bytearray(4 * -(-vocab_size // 32))
    for token in eos_token_ids:
        only_ends[token // 8] |= 1 << token % 8
    trials = Trials(tokenizer_json, vocab_size, eos_token_ids)
    return _Tokens(table, len(only_ends), bytes(only_ends), trials)
