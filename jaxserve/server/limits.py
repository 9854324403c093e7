"""How large one request may be, whatever route it comes by: a review of what `Intake` makes."""

import dataclasses
from collections.abc import Callable

from jaxserve.errors import RequestError
from jaxserve.request import Request, Task
from jaxserve.server.config import ServerConfig


def review(config: ServerConfig) -> Callable[[Request], Request]:
    """Refuses requests that are too large. Who does not say how long the answer may be gets the most there is."""

    def reviewed(request: Request) -> Request:
        num_prompt, params = len(request.prompt_token_ids), request.params
        if config.max_prompt_tokens is not None and num_prompt > config.max_prompt_tokens:
            raise RequestError(f"the prompt has {num_prompt} tokens, and this server takes {config.max_prompt_tokens}")
        if params.n > config.max_answers_per_request:
            raise RequestError(
                f"n={params.n} is above {config.max_answers_per_request}, the most that this server gives"
            )
        limit = config.max_tokens_per_request
        if limit is None or request.task is not Task.GENERATE:
            return request
        if params.max_tokens is None:
            return dataclasses.replace(request, params=dataclasses.replace(params, max_tokens=limit))
        if params.max_tokens > limit:
            raise RequestError(f"max_tokens={params.max_tokens} is above {limit}, the most that this server gives")
        return request

    return reviewed
