"""Turns of conversations -> requests of the engine."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jaxserve.async_engine import AsyncEngine
from jaxserve.errors import RequestError
from jaxserve.intake import Prompt
from jaxserve.openai.constraint import told_with
from jaxserve.openai.turn import Turn
from jaxserve.output import RequestOutput
from jaxserve.request import SamplingParams
from jaxserve.stream import Stream

T = TypeVar("T")

_LONG = 1 << 12  # characters; some 5 ms, where calls are looked for
_PER_LOGPROB = 8  # characters that take as long as one log-probability


async def start(engine: AsyncEngine, turn: Turn, meta: Mapping[str, Any], request_id: str) -> Stream:
    """Queue a turn. The chat template is rendered in another thread.

    Raises:
      ApiError, RequestError, UnavailableError: it cannot be served, or not now.
    """

    def make():
        prompt = turn.prompt(engine.intake.tokenizer)
        return made(engine, prompt, turn.params, turn.form, meta=meta, request_id=request_id)

    return engine.start(*await engine.prepare(make))


def made(engine: AsyncEngine, prompt: Prompt, params: SamplingParams, form: str | None, **named: Any) -> Any:
    """What `Intake.request` makes. A fault of a constraint is told with `form`, the field that asked for it."""
    try:
        return engine.intake.request(prompt, params, **named)
    except RequestError as error:
        raise told_with(str(error), form) if form and "structured_outputs" in str(error) else error from None


async def told(engine: AsyncEngine, output: RequestOutput, work: Callable[[], T]) -> T:
    """What `work` makes of an answer. Long ones are read in another thread: nobody else is to wait for that."""
    texts = sum(len(each.text) for each in output.outputs)
    tables = [table for each in output.outputs for table in each.logprobs or ()] + (output.prompt_logprobs or [])
    size = texts + _PER_LOGPROB * sum(len(table or ()) for table in tables)
    return work() if size < _LONG else await engine.prepare(work)
