"""Grammars are tried out in a process of their own, before they get into this one.

The library that reads them cannot be interrupted, and a chain of some thousand references overruns its stack: what a
stranger sends may cost a small process, never the engine. This file is that process, too: it imports nothing of ours.
"""

import contextlib
import json
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

_CPU_S = 0.5  # of one trial: common schemas take some milliseconds, and who comes after waits so long
_WALL_S = 20.0
_MEMORY = 3 << 30  # bytes of addresses
_STACK = 1 << 20  # bytes; the threads of the engine have eight times as many
_WALK_TOKENS, _WALK_S = 64, 0.1  # an answer by chance, to see what masks cost further on
_MASK_S = 0.1  # CPU time that a single mask may take
_MAX_STATES = 25_000  # of the automaton; each takes 1 or 2 kB, in every answer that meets it


class Trials:
    """The other process. It is started when it is needed first, and again when a trial has cost it. One thread calls."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: tuple[int, ...]):
        self._hello = {"tokenizer": tokenizer_json, "vocab_size": vocab_size, "ends": list(eos_token_ids)}
        self._process: list[subprocess.Popen[bytes]] = []  # one, or none
        weakref.finalize(self, _stop, self._process)

    def run(self, form: str, text: str) -> str:
        """Try a grammar; returns it in the library's own form. `form` is one that `llguidance.grammar_from` knows.

        Raises:
          ValueError: what is wrong with it, in the library's words.
        """
        answer = self._ask({"form": form, "text": text})
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["grammar"]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._process and self._process[0].poll() is not None:  # somebody has ended it
            _stop(self._process)
        if not self._process:
            self._process.append(_start())
            question = self._hello | question
        (process,) = self._process
        assert process.stdin is not None and process.stdout is not None
        alarm = threading.Timer(_WALL_S, process.kill)
        alarm.start()
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        except (OSError, ValueError):  # it has ended: there is no line, or half of one
            _stop(self._process)
            return {"error": "it is too large or too complex"}
        finally:
            alarm.cancel()


def limits() -> LLParserLimits:
    """What every grammar is compiled with, here and there."""
    return LLParserLimits(max_lexer_states=_MAX_STATES, verbose_errors=False)


def _start() -> "subprocess.Popen[bytes]":
    pipe, command = subprocess.PIPE, [sys.executable, "-P", __file__]
    return subprocess.Popen(  # noqa: S603  this very file; Ctrl-C is not for it
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _stop(processes: "list[subprocess.Popen[bytes]]") -> None:
    while processes:
        process = processes.pop()
        process.kill()
        process.communicate()


# From here on: the other process.


def _serve() -> None:
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokens: LLTokenizer | None = None
    for line in sys.stdin.buffer:
        question = json.loads(line)
        if tokens is None:
            tokens = LLTokenizer(question["tokenizer"], n_vocab=question["vocab_size"], eos_token=question["ends"])
        signal.setitimer(signal.ITIMER_PROF, _CPU_S)  # its signal ends this process, wherever it is
        try:
            answer = {"grammar": _try(question["form"], question["text"], tokens)}
        except ValueError as error:
            answer = {"error": str(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _try(form: Any, text: str, tokens: LLTokenizer) -> str:
    grammar = grammar_from(form, text)
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=limits())
    chance, end_s = random.Random(0), time.process_time() + _WALK_S
    for _ in range(_WALK_TOKENS):
        started_s = time.process_time()
        mask = matcher.compute_bitmask()
        taken_s = time.process_time() - started_s
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        if taken_s > _MASK_S:
            raise ValueError("it is too complex to be followed token by token")
        allowed = [i for i in range(tokens.vocab_size) if mask[i // 8] >> i % 8 & 1 and i not in tokens.eos_tokens]
        if not allowed or matcher.is_stopped() or started_s > end_s:
            break
        matcher.consume_token(chance.choice(allowed))
    return grammar


if __name__ == "__main__":
    threading.stack_size(_STACK)
    threading.Thread(target=_serve).start()
