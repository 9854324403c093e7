"""Turns of conversations -> requests of the engine."""

from collections.abc import Mapping
from typing import Any

from jaxserve.async_engine import AsyncEngine
from jaxserve.errors import RequestError
from jaxserve.openai.constraint import told_with
from jaxserve.openai.turn import Turn
from jaxserve.stream import Stream


async def start(engine: AsyncEngine, turn: Turn, meta: Mapping[str, Any], request_id: str) -> Stream:
    """Queue a turn. The chat template is rendered in another thread.

    Raises:
      ApiError, RequestError, UnavailableError: it cannot be served, or not now.
    """

    def make():
        prompt = turn.prompt(engine.intake.tokenizer)
        try:
            return engine.intake.request(prompt, turn.params, meta=meta, request_id=request_id)
        except RequestError as error:
            raise told_with(str(error), turn.form) if "structured_outputs" in str(error) else error from None

    return engine.start(*await engine.prepare(make))
