"""A stand-in for `LLM` that needs no jax: tokens are bytes, and the answer to a prompt is the prompt in capitals.

It has what the command line uses of `LLM`, and the same rules: prompts above 100 tokens are refused, at most
`max_num_seqs` requests advance in a step, each by one token.
"""

import dataclasses
import itertools

import numpy as np

from jaxserve.config import EngineConfig
from jaxserve.errors import RequestError
from jaxserve.output import CompletionOutput, Event, Logprob, RequestMetrics, RequestOutput
from jaxserve.request import Request, SamplingParams, Task

MAX_TOKENS = 100


class ByteTokenizer:
    def encode(self, text, *, add_special_tokens=True):
        return list(text.encode())

    def decode(self, token_ids, *, skip_special_tokens=True):
        return bytes(token_ids).decode(errors="replace")

    chat_template = "a <role> before each message"

    def apply_chat_template(self, messages, **variables):
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


class FakeEngine:
    """`num_steps` and `max_seen` tell a test how well the engine was kept busy."""

    def __init__(self, max_num_seqs):
        self.max_num_seqs = max_num_seqs
        self.running = {}
        self.num_steps = 0
        self.max_seen = 0
        self.aborted = []

    def add(self, request, prompt=None):
        answers = [CompletionOutput(index=index) for index in range(request.params.n)]
        for answer in answers if request.params.logprobs is not None else ():
            answer.logprobs = []
        ids = list(request.prompt_token_ids)
        output = RequestOutput(request.request_id, prompt, ids, answers, RequestMetrics(float(self.num_steps)))
        if request.params.prompt_logprobs is not None:
            output.prompt_logprobs = [None, *({token: Logprob(-1.0, 1, chr(token))} for token in ids[1:])]
        self.running[request.request_id] = request, output

    def abort(self, request_id):
        self.aborted.append(request_id)
        self.running.pop(request_id, None)
        return []

    def step(self):
        self.num_steps += 1
        self.max_seen = max(self.max_seen, len(self.running))
        events = []
        for request, output in list(self.running.values())[: self.max_num_seqs]:
            events.extend(self.advance(request, output))
        return events

    def advance(self, request, output):
        limit = request.params.max_tokens or MAX_TOKENS
        reply = bytes(request.prompt_token_ids).decode().upper().encode()[:limit]
        if request.task is Task.EMBED:
            output.hidden = np.array([3.0, 4.0], np.float32)
        for answer in output.outputs:
            if request.task is Task.GENERATE:
                self.add_token(answer, reply[len(answer.token_ids)])
            done = request.task is Task.EMBED or len(answer.token_ids) == len(reply)
            answer.finish_reason = ("length" if len(reply) == limit else "stop") if done else None
            if done and answer is output.outputs[-1]:
                output.finished = True
                output.metrics.finished_s = self.num_steps + 1.0
                del self.running[request.request_id]
            output.metrics.first_token_s = output.metrics.first_token_s or float(self.num_steps)
            text = answer.text[-1:]
            yield Event(request.request_id, answer.index, text, (0,), answer.finish_reason, output)

    def add_token(self, answer, token):
        answer.token_ids.append(token)
        answer.text += chr(token)
        if answer.logprobs is not None:
            top = {ord("!"): Logprob(-0.5, 1, "!"), ord("?"): Logprob(float("-inf"), 2, "?")}
            answer.logprobs.append({token: Logprob(-2.0, 3, chr(token))} | top)


class FakeLLM:
    """Records the last one made, so that a test can look at it."""

    last = None
    max_model_len = MAX_TOKENS
    embedding_size = 2

    def __init__(self, model, **options):
        self.model = model
        self.config = EngineConfig(**options)
        self._engine = FakeEngine(self.config.max_num_seqs)
        self._ids = itertools.count()
        self.tokenizer = ByteTokenizer()
        self.submitted = []
        self.unpinned = []
        FakeLLM.last = self

    def _request(self, prompt, params, *, task=Task.GENERATE, meta=None):
        text = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, dict):
            text, prompt = prompt["prompt"], prompt["prompt_token_ids"]
        ids = tuple(prompt.encode() if isinstance(prompt, str) else prompt)
        if not ids or len(ids) > MAX_TOKENS:
            raise RequestError(f"the prompt has {len(ids)} tokens")
        if b"crash" in bytes(ids):
            raise TypeError("a bug")
        request_id = f"r{next(self._ids)}"
        return Request(request_id=request_id, prompt_token_ids=ids, params=params, task=task, **(meta or {})), text

    def chat_prompt(self, messages, **variables):
        text = self.tokenizer.apply_chat_template(messages, **variables)
        return {"prompt": text, "prompt_token_ids": self.tokenizer.encode(text)}

    def submit(self, prompt, params=None, *, task=Task.GENERATE, meta=None):
        request, text = self._request(prompt, params or SamplingParams(), task=task, meta=meta)
        self._engine.add(request, text)
        self.submitted.append(request)
        return request.request_id

    def unpin(self, name):
        self.unpinned.append(name)

    def step(self):
        return list(self._engine.step())

    def abort(self, request_id):
        self._engine.abort(request_id)

    def stream_events(self, prompt, params=None, *, meta=None):
        request, text = self._request(prompt, params or SamplingParams(), meta=meta)
        self._engine.add(request, text)
        self.submitted.append(request)
        try:
            while self._engine.running:
                yield from self._engine.step()
        finally:
            self._engine.abort(request.request_id)

    def generate(self, prompts, params=None, *, progress=False, meta=None):
        return [list(self.stream_events(prompt, params, meta=meta))[-1].output for prompt in prompts]

    def metrics(self):
        facts = {"load_s": 0.1, "warm_up_s": 0.2, "backend": "fake", "attention_backend": "fake", "dtype": "float32"}
        facts["compiles_after_ready"] = 0
        return facts | dataclasses.asdict(self.config)
