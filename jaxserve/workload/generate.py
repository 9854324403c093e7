"""Generated workloads by name. The same name, options and seed give the same calls."""

import inspect
import math
from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType
from typing import Any

from jaxserve.config import reject_unknown
from jaxserve.errors import ConfigError
from jaxserve.workload.call import Call, Span, Workload, make_workload
from jaxserve.workload.lengths import Even, Lengths, Lognormal, Pareto, arrivals, new_tokens
from jaxserve.workload.programs import agents, chains, chat, map_reduce, text_to_sql, tree_search

MOST_PROGRAMS = 1_000_000


def sharegpt(
    rng: Random,
    *,
    count: int,
    rate: float,
    cv: float = 1.0,
    prompt: Lengths = Lognormal(1100, 0.9, most=8000),
    answer: Lengths = Lognormal(181, 0.8, most=2048),
) -> Workload:
    """Single calls whose lengths are spread as in conversations that people share: long tails, nothing in common."""
    new = new_tokens()
    times = arrivals(rng, count, rate, cv)
    return make_workload(
        "sharegpt",
        [
            Call(
                call_id=str(number),
                prompt=(Span(new(), prompt.draw(rng)),),
                output_tokens=answer.draw(rng),
                arrival_s=arrival_s,
            )
            for number, arrival_s in enumerate(times)
        ],
    )


def heavy_tail(
    rng: Random, *, count: int, rate: float, cv: float = 1.0, alpha: float = 0.9, most: int = 6000
) -> Workload:
    """Single calls with Pareto lengths, prompts and answers, as in Llumnix's generated traces (OSDI 2024, arXiv
    2406.03243)."""
    lengths = Pareto(alpha, 16, most)
    calls = sharegpt(rng, count=count, rate=rate, cv=cv, prompt=lengths, answer=lengths).calls
    return Workload("heavy-tail", calls)


def tenants(
    rng: Random,
    *,
    count: int,
    rate: float,
    cv: float = 1.0,
    clients: int = 6,
    skew: float = 4.0,
    documents: int = 6,
    document: Lengths = Even(3000, 3000),
    question: Lengths = Even(30, 120),
    answer: Lengths = Even(20, 80),
) -> Workload:
    """Clients who ask about documents of their own, in random order; the first sends `skew` times as many calls as each
    of the others. What DLPM is for (arXiv 2501.14312): an order that keeps prefixes cached and is fair, too."""
    new, calls = new_tokens(), list[Call]()
    texts = [[Span(new(), document.draw(rng)) for _ in range(documents)] for _ in range(clients)]
    weights = [skew] + [1.0] * (clients - 1)
    for number, arrival_s in enumerate(arrivals(rng, count, rate, cv)):
        client = rng.choices(range(clients), weights)[0]
        calls.append(
            Call(
                call_id=str(number),
                prompt=(rng.choice(texts[client]), Span(new(), question.draw(rng))),
                output_tokens=answer.draw(rng),
                arrival_s=arrival_s,
                client=f"client{client}",
            )
        )
    return make_workload("tenants", calls)


def documents(
    rng: Random,
    *,
    count: int,
    rate: float = math.inf,
    cv: float = 1.0,
    questions: int = 8,
    document: Lengths = Even(1000, 4000),
    question: Lengths = Even(20, 100),
    short: Lengths = Even(10, 60),
    long: Lengths = Even(200, 400),
    long_share: float = 0.3,
) -> Workload:
    """A batch job: `questions` questions about each of `count` documents, shuffled, all there at the start.
    `long_share` of the documents ask for long answers. What BatchLLM is for (arXiv 2412.03594)."""
    new, prompts = new_tokens(), list[tuple[Span, Span, int]]()
    for _ in range(count):
        text = Span(new(), document.draw(rng))
        answer = long if rng.random() < long_share else short
        prompts += [(text, Span(new(), question.draw(rng)), answer.draw(rng)) for _ in range(questions)]
    rng.shuffle(prompts)
    times = arrivals(rng, len(prompts), rate, cv)
    return make_workload(
        "documents",
        [
            Call(call_id=str(number), prompt=(text, ask), output_tokens=length, max_tokens=length, arrival_s=arrival_s)
            for number, ((text, ask, length), arrival_s) in enumerate(zip(prompts, times, strict=True))
        ],
    )


WORKLOADS: Mapping[str, Callable[..., Workload]] = MappingProxyType(
    {
        "sharegpt": sharegpt,
        "heavy-tail": heavy_tail,
        "chat": chat,
        "chains": chains,
        "agents": agents,
        "tree-search": tree_search,
        "map-reduce": map_reduce,
        "text-to-sql": text_to_sql,
        "tenants": tenants,
        "documents": documents,
    }
)
_LENGTHS = {"lognormal": Lognormal, "even": Even, "pareto": Pareto}


def generate(
    name: str, *, count: int, rate: float | None = None, seed: int = 0, options: Mapping[str, Any] | None = None
) -> Workload:
    """A workload of `count` programs (of single calls, or documents), `rate` of them per second.

    `options` are the further arguments of the function in `WORKLOADS`. A distribution of lengths is one of
    `["lognormal", median, sigma]`, `["even", least, most]` and `["pareto", alpha, least, most]`, or one number.

    Raises:
      ConfigError: no such workload or option, or a value that cannot be.
    """
    reject_unknown([name], WORKLOADS, what="workload")
    function = WORKLOADS[name]
    known = inspect.signature(function).parameters
    options = dict(options or {})
    reject_unknown(
        options,
        [each for each in known if each not in ("rng", "count", "rate")],
        what=f"option of the workload {name!r}:",
    )
    if not isinstance(count, int) or not 1 <= count <= MOST_PROGRAMS:
        raise ConfigError(f"{count!r:.40} programs; give a whole number from 1 to {MOST_PROGRAMS:,}")
    if rate is None:
        rate = math.inf if known["rate"].default is math.inf else 1.0
    values = {key: _value(name, key, value, known[key].default) for key, value in options.items()}
    return function(Random(f"{name} {seed}"), count=count, rate=rate, **values)


def _value(name: str, key: str, value: Any, default: Any) -> Any:
    """An option as its default's type asks for it."""
    problem = ConfigError(f"option {key}={value!r:.60} of the workload {name!r} must be like {default!r}")
    if isinstance(default, Lengths):
        return _lengths(value, problem)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if value is None and default is not None and key != "deadline_s":
        raise problem
    if value is not None and (not is_number or (isinstance(default, int) and not isinstance(value, int))):
        raise problem
    if key in ("clients", "documents", "width", "rounds", "turns", "questions") and not value:
        raise ConfigError(f"option {key}=0 of the workload {name!r} must be at least 1")
    return value


def _lengths(value: Any, problem: ConfigError) -> Lengths:
    if isinstance(value, Lengths):
        return value
    if isinstance(value, int) and value >= 1:
        return Even(value, value)
    match value:
        case [str(kind), *numbers] if kind in _LENGTHS and all(isinstance(n, (int, float)) and n >= 0 for n in numbers):
            try:
                made = _LENGTHS[kind](*numbers)
                made.draw(Random(0))
            except (TypeError, ValueError, ZeroDivisionError, OverflowError):
                raise problem from None
            return made
    raise problem
