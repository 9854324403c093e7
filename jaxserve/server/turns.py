"""Turns of conversations -> requests of the engine."""

from collections.abc import Mapping
from typing import Any

from jaxserve.async_engine import AsyncEngine
from jaxserve.errors import RequestError
from jaxserve.intake import Prompt
from jaxserve.openai.constraint import at_fault
from jaxserve.openai.turn import Turn
from jaxserve.request import SamplingParams
from jaxserve.stream import Stream


async def start(engine: AsyncEngine, turn: Turn, meta: Mapping[str, Any], request_id: str) -> Stream:
    """Queue a turn. The chat template is rendered in another thread.

    Raises:
      ApiError, RequestError, UnavailableError: it cannot be served, or not now.
    """

    def make():
        prompt = turn.prompt(engine.intake.tokenizer)
        return made(engine, prompt, turn.params, turn.form, meta=meta, request_id=request_id)

    return engine.start(*await engine.prepare(make))


def made(engine: AsyncEngine, prompt: Prompt, params: SamplingParams, form: str, **named: Any) -> Any:
    """What `Intake.request` makes. A fault of a constraint is told with `form`, the field that asked for it."""
    try:
        return engine.intake.request(prompt, params, **named)
    except RequestError as error:
        raise at_fault(error, form) from None
