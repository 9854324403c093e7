"""Visit: one HTTP request, and what it asks of the engine."""

import dataclasses
from contextvars import ContextVar

from jaxserve.output import RequestOutput
from jaxserve.stream import Stream


@dataclasses.dataclass(slots=True)
class Visit:
    """One HTTP request."""

    request_id: str
    method: str
    began_s: float
    status: int = 0  # 0: no answer yet
    is_stream: bool = False
    is_whole: bool = False  # the answer was sent to its end
    has_ended: bool = False
    streams: list[Stream] = dataclasses.field(default_factory=list)  # what it has asked of the engine

    @property
    def outputs(self) -> list[RequestOutput]:
        """What the engine has answered."""
        return [stream.output for stream in self.streams if stream.output is not None]

    @property
    def finish_reason(self) -> str:
        """Why answers have ended, each reason once. Who was left before the end is being ended."""
        reasons = (answer.finish_reason or "abort" for output in self.outputs for answer in output.outputs)
        return ",".join(dict.fromkeys(reasons)) or "abort"


current: ContextVar[Visit | None] = ContextVar("visit", default=None)


def note(stream: Stream) -> None:
    """For `AsyncEngine.listeners`: the request that is being answered here has asked for this. Routes need not say so."""
    visit = current.get()
    if visit is None or visit.has_ended:  # it has left work behind, which goes on without it
        return
    if not visit.streams or visit.streams[-1] is not stream:  # several apps of one engine tell of the same
        visit.streams.append(stream)
