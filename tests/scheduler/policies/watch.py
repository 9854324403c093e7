"""A policy under observation: what service each client had, and how far apart those drifted who both had to wait."""

import collections
import itertools
import random
from collections.abc import Callable, Iterable

from jaxserve.request import Request
from jaxserve.scheduler.policy import View
from tests.fakes import VOCAB_SIZE, Rig, ask, make_engine


class Watch:
    """Stands in a policy's place and passes everything on. Service is counted from what the scheduler says, not from what
    the policy makes of it: `prompt_cost(view, num_cached)` on the first admission, 2 for each answer token."""

    def __init__(self, rig: Rig, prompt_cost: Callable[[View, int], float] = lambda view, num_cached: view.num_prompt):
        self.rig, self.policy, self._prompt_cost = rig, rig.scheduler._policy, prompt_cost
        self.service = collections.Counter[str]()
        self.admitted: list[tuple[View, dict[str, float], set[str]]] = []  # with service and who waited, before it
        self.worst_gap = 0.0
        self.waiting = collections.Counter[str]()  # never admitted so far
        self._since: dict[tuple[str, str], tuple[float, float]] = {}  # least and most difference while both waited
        rig.scheduler._policy = self  # pyright: ignore[reportAttributeAccessIssue]

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def on_arrival(self, view, now_s):
        self.waiting[view.request.client] += 1
        self.policy.on_arrival(view, now_s)

    def tick(self, now_s):
        self._compare()
        self.policy.tick(now_s)

    def on_admit(self, view, num_cached, now_s):
        if not view.num_preemptions:
            self.admitted.append((view, dict(self.service), {c for c, n in self.waiting.items() if n}))
            self.service[view.request.client] += self._prompt_cost(view, num_cached)
            self._compare()
            self._leave(view)
        self.policy.on_admit(view, num_cached, now_s)

    def charge(self, view, prefill_tokens, decode_tokens):
        self.service[view.request.client] += 2 * decode_tokens
        self.policy.charge(view, prefill_tokens, decode_tokens)

    def on_abort(self, view, now_s):
        if all(each is not view for each, _, _ in self.admitted):
            self._leave(view)
        self.policy.on_abort(view, now_s)

    def _leave(self, view):
        client = view.request.client
        self.waiting[client] -= 1
        if not self.waiting[client]:  # what comes later is another time
            self._since = {pair: span for pair, span in self._since.items() if client not in pair}

    def _compare(self):
        for pair in itertools.combinations(sorted(c for c, n in self.waiting.items() if n), 2):
            gap = self.service[pair[0]] - self.service[pair[1]]
            least, most = self._since.get(pair, (gap, gap))
            self._since[pair] = min(least, gap), max(most, gap)
            self.worst_gap = max(self.worst_gap, max(most, gap) - min(least, gap))


def tenants(
    rng: random.Random, count: int, *, clients: str = "abc", skew: int = 3, most_prompt: int = 20, most_answer: int = 12
) -> list[Request]:
    """Requests that begin like others of their client. The first client sends `skew` times as many as the others."""
    documents = {c: [[rng.randrange(1, VOCAB_SIZE) for _ in range(12)] for _ in range(3)] for c in clients}
    requests = []
    for index in range(count):
        client = rng.choice(clients[0] * skew + clients[1:])
        start = rng.choice(documents[client])[: rng.choice((0, 12))]
        prompt = [*start, *(rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, most_prompt - len(start))))]
        requests.append(
            ask(f"r{index}", prompt, client=client, max_tokens=rng.randint(1, most_answer), ignore_eos=True)
        )
    return requests


def serve(rig: Rig, requests: Iterable[Request], rng: random.Random, *, burst: int = 3, aborts: float = 0.0) -> None:
    """Feed requests a few at a time until all have ended."""
    todo = list(reversed(list(requests)))
    for _ in range(20_000):
        for _ in range(min(rng.randint(0, burst), len(todo))):
            rig.engine.add(todo.pop())
        if rng.random() < aborts and rig.engine._jobs:
            rig.engine.abort(rng.choice(sorted(rig.engine._jobs)))
        rig.step()
        if not todo and not rig.engine.has_work:
            break
    rig.check_empty()


def small_engine(policy: str, num_blocks: int = 24, **options) -> Rig:
    """An engine in which requests have to wait for each other."""
    defaults = {"num_slots": 4, "budget": 16, "max_model_len": 40, "block_size": 4}
    return make_engine(policy=policy, num_blocks=num_blocks, **defaults | options)
