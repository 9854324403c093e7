"""Which requests are sent: random lengths, conversations of a file, a trace, or a generated workload."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from jaxserve.errors import ConfigError
from jaxserve.loadgen.prompts import Vocabulary
from jaxserve.workload.call import Call, Span, Workload, make_workload

# A conversation of ShareGPT is used if its lengths in tokens are like this, as in vLLM's benchmarks.
_LEAST, _MOST_PROMPT, _MOST_BOTH = 4, 1024, 2048


@dataclasses.dataclass(frozen=True, slots=True)
class Lengths:
    """Of random prompts, in tokens. `ratio`: lengths lie evenly between (1 - ratio) and (1 + ratio) of what is given."""

    prompt: int
    answer: int
    prefix: int = 0  # before that, shared by all
    ratio: float = 0.0


def random_calls(count: int, lengths: Lengths, times: Sequence[float], seed: int) -> Workload:
    """Prompts that have nothing in common but their prefix.

    Raises:
      ConfigError: lengths that cannot be.
    """
    if min(lengths.prompt + lengths.prefix, lengths.answer) < 1 or min(lengths.prompt, lengths.prefix) < 0:
        raise ConfigError("prompts and answers need at least one token each")
    if not 0 <= lengths.ratio < 1:
        raise ConfigError(f"--random-range-ratio {lengths.ratio:g} must be at least 0 and below 1")
    rng = Random(f"lengths {seed}")

    def draw(length: int) -> int:
        return max(rng.randint(round(length * (1 - lengths.ratio)), round(length * (1 + lengths.ratio))), 1)

    prefix = (Span(1, lengths.prefix),) if lengths.prefix else ()
    return make_workload(
        "random",
        [
            Call(
                call_id=str(number),
                prompt=(*prefix, Span(number + 2, draw(lengths.prompt))) if lengths.prompt else prefix,
                output_tokens=draw(lengths.answer),
                arrival_s=arrival_s,
            )
            for number, arrival_s in zip(range(count), times, strict=True)
        ],
    )


def read_sharegpt(
    path: Path, count: int, vocabulary: Vocabulary, seed: int, answer_length: int | None = None
) -> list[tuple[str, int, int]]:
    """First questions of conversations: text, its tokens, tokens of the answer. In random order.

    The file is ShareGPT's: [{"conversations": [{"value": ...}, ...]}, ...].

    Raises:
      ConfigError: the file is of another form, or has too few conversations of a usable length.
      OSError: it cannot be read.
    """
    try:
        talks = [talk["conversations"] for talk in json.loads(path.read_text(encoding="utf-8"))]
        pairs = [(str(talk[0]["value"]), str(talk[1]["value"])) for talk in talks if len(talk) > 1]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ConfigError(f'{path} is not like ShareGPT: [{{"conversations": [{{"value": ...}}, ...]}}, ...]') from None
    Random(f"sharegpt {seed}").shuffle(pairs)
    chosen = list[tuple[str, int, int]]()
    for question, said in pairs:
        if len(chosen) == count:
            break
        asked, answered = vocabulary.count(question), answer_length or vocabulary.count(said)
        if min(asked, answered) >= _LEAST and asked <= _MOST_PROMPT and asked + answered <= _MOST_BOTH:
            chosen.append((question, asked, answered))
    if len(chosen) < count:
        raise ConfigError(
            f"{path} has {len(chosen)} conversations of a usable length, and {count} are wanted",
            remedy="Lower --num-prompts",
        )
    return chosen


def text_calls(rows: Sequence[tuple[str, int, int]], times: Sequence[float]) -> tuple[Workload, dict[str, str]]:
    """Calls with texts of their own, and these by call."""
    calls = [
        Call(call_id=str(n), prompt=(Span(n + 1, asked),), output_tokens=answered, arrival_s=arrival_s)
        for n, ((_, asked, answered), arrival_s) in enumerate(zip(rows, times, strict=True))
    ]
    return make_workload("sharegpt", calls), {str(n): text for n, (text, _, _) in enumerate(rows)}


def body_of(call: Call, prompt: Any, *, is_chat: bool, shared: dict[str, Any], with_meta: bool) -> bytes:
    """The JSON of a request. `shared`: the fields that all have; `with_meta`: what jaxserve's scheduler wants to know."""
    content = {"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}
    body = {**content, "max_tokens": call.output_tokens, **shared}
    if with_meta:
        meta = {"client": call.client, "program": call.program, "stage": call.stage, "priority": call.priority}
        body |= {name: value for name, value in meta.items() if value}
        if call.parents:
            body["parents"] = list(call.parents)
        if call.deadline_s is not None:
            body["deadline_ms"] = round(1000 * call.deadline_s)
    return json.dumps(body).encode()
