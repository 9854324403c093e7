"""Programs for tests of policies: random graphs of requests, and an engine that is fed each when its parents have ended."""

import random
from collections.abc import Callable, Sequence

from jaxserve.output import RequestOutput
from jaxserve.request import Request
from jaxserve.scheduler.policy import View
from tests.fakes import VOCAB_SIZE, Rig, ask, check_answer


def call(rng: random.Random, name: str, program: str, *, prompt=(2, 14), answer=(1, 16), **options) -> Request:
    """A request with random lengths, whose answer does not end early."""
    length = rng.randint(*answer)
    tokens = [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(*prompt))]
    return ask(name, tokens, max_tokens=length, min_tokens=length, program=program, **options)


def chains(rng: random.Random, count: int, longest: int = 5, **options) -> list[Request]:
    """Programs whose calls come one after the other."""
    requests = []
    for p in range(count):
        for step in range(rng.randint(1, longest)):
            parents = (f"p{p}.{step - 1}",) if step else ()
            requests.append(call(rng, f"p{p}.{step}", f"p{p}", parents=parents, **options))
    return requests


def graphs(rng: random.Random, count: int, size: int = 6, **options) -> list[Request]:
    """Programs whose calls have up to three random earlier ones as parents."""
    requests = []
    for p in range(count):
        for step in range(rng.randint(1, size)):
            earlier = [f"p{p}.{before}" for before in range(step)]
            parents = tuple(rng.sample(earlier, min(len(earlier), rng.randint(0, 3))))
            requests.append(call(rng, f"p{p}.{step}", f"p{p}", parents=parents, **options))
    return requests


def drive(
    rig: Rig,
    requests: Sequence[Request],
    *,
    seed: int = 0,
    abort_share: float = 0.0,
    tells_parents: bool = True,
    observe: Callable[[], None] = lambda: None,
) -> dict[str, RequestOutput]:
    """Add each request some time after its parents have ended, abort some, and check the answers of the others."""
    rng, waiting, outputs, live = random.Random(seed), list(requests), {}, set()
    aborted = set()
    for _ in range(20_000):
        for request in list(waiting):
            if all(parent in outputs for parent in request.parents) and rng.random() < 0.4:
                waiting.remove(request)
                live.add(request.request_id)
                rig.engine.add(request if tells_parents else _orphan(request))
        for name in sorted(live):
            if rng.random() < abort_share:
                aborted.add(name)
                outputs |= {event.request_id: event.output for event in rig.engine.abort(name)}
                live.discard(name)
        for event in rig.step():
            if event.output.finished:
                outputs[event.request_id] = event.output
                live.discard(event.request_id)
        observe()
        if not waiting and not rig.engine.has_work:
            break
    rig.check_empty()
    for request in requests:
        if request.request_id not in aborted:
            check_answer(outputs[request.request_id], request)
    return outputs


def _orphan(request: Request) -> Request:
    fields = {name: getattr(request, name) for name in Request.__slots__ if name != "parents"}
    return Request(**fields)


def view_of(request: Request, arrival_s: float = 0.0) -> View:
    """As the scheduler would show it, for tests that call hooks themselves."""
    num_prompt = len(request.prompt_token_ids)
    return View(request.request_id, request, arrival_s, num_prompt, num_prompt + (request.params.max_tokens or 0))
