"""Work that would hold up everybody's tokens is done in another thread, in pieces that let go of Python's lock."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxserve.async_engine import AsyncEngine
from jaxserve.output import RequestOutput
from jaxserve.server.json import JsonResponse, LongJsonResponse

T = TypeVar("T")

_LONG = 1 << 12  # characters; some 5 ms, where calls are looked for
_PER_LOGPROB = 8  # characters that take as long as one log-probability


async def aside(engine: AsyncEngine, size: int, work: Callable[[], T]) -> T:
    """What `work` makes: at once if it is short, else in another thread. `size`: characters of an answer, or numbers of a
    vector, which take about as long."""
    return work() if size < _LONG else await engine.prepare(work)


async def answered(engine: AsyncEngine, size: int, content: Callable[[], Any]) -> JsonResponse:
    """What `content` makes, as a response; like `aside`."""
    if size < _LONG:
        return JsonResponse(content())
    return await engine.prepare(lambda: LongJsonResponse(content()))


def size_of(outputs: Sequence[RequestOutput]) -> int:
    """How much there is to tell of answers, for `aside`."""
    answers = [each for output in outputs for each in output.outputs]
    tables = [table for each in answers for table in each.logprobs or ()]
    tables += [table for output in outputs for table in output.prompt_logprobs or () if table]
    return sum(len(each.text) for each in answers) + _PER_LOGPROB * sum(map(len, tables))
