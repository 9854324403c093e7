"""How long the stages of programs take, and what still comes after them: learned from programs that have ended.

HexGen-Text2SQL (2025, arXiv 2505.05286) gives each stage of a query its part of the time that is left, in proportion to
the mean service of the stage and of those still to come. There these come from a list of stages that somebody wrote;
here they are learned, so that loops and skipped stages have the length that they had lately. How long an answer will be
is never asked.
"""

from collections import OrderedDict

from jaxserve.request import Request
from jaxserve.scheduler.programs import Programs

_MOST_STAGES = 1000  # names come from outside


class Averages:
    """Means by name; the newest value counts `smoothing`, all earlier ones less and less."""

    def __init__(self, smoothing: float):
        self._smoothing = smoothing
        self._means: OrderedDict[str, float] = OrderedDict()
        self._all: float | None = None

    def note(self, name: str, value: float) -> None:
        """A new value."""
        mean = self._means.pop(name, value)
        self._means[name] = mean + self._smoothing * (value - mean)
        if len(self._means) > _MOST_STAGES:
            self._means.popitem(last=False)
        self._all = value if self._all is None else self._all + self._smoothing * (value - self._all)

    def of(self, name: str) -> float:
        """The mean of a name; of one that is new that of all; 0 if there is none yet."""
        return self._means.get(name, self._all or 0.0)


class _Round:
    """Calls of a program at the same time. What comes after them waits for the longest."""

    __slots__ = ("service_s", "stages")

    def __init__(self) -> None:
        self.stages: set[str] = set()
        self.service_s = 0.0


class _Query:
    """One program under way."""

    __slots__ = ("first_s", "num_live", "rounds")

    def __init__(self, now_s: float):
        self.first_s = now_s
        self.rounds: list[_Round] = []
        self.num_live = 0


class Workflow:
    """Deadlines of calls within the deadlines of their programs. Policies of several replicas may share one."""

    def __init__(self, smoothing: float = 0.1, ttl_s: float = 600.0):
        """A program that has had no call for `ttl_s` seconds has ended."""
        self.programs: Programs[_Query] = Programs(_Query, ttl_s, forget=self._learn)
        self._service = Averages(smoothing)  # of a call, by stage
        self._after = Averages(smoothing)  # of all that comes after a call, by stage

    def begin(self, request: Request, now_s: float) -> tuple[float, float] | None:
        """A call comes. Returns until when it should be answered, and until when its program; None: no matter."""
        query = self.programs.join(request, now_s)
        if not query.num_live:
            query.rounds.append(_Round())
        query.num_live += 1
        query.rounds[-1].stages.add(request.stage)
        if request.deadline_s is None:
            return None
        end_s = query.first_s + request.deadline_s
        left_s = end_s - now_s
        return (now_s + self.budget_s(request.stage, left_s) if left_s > 0 else end_s), end_s

    def budget_s(self, stage: str, left_s: float) -> float:
        """The part of the time left that a call of this stage may take: all of it, if nothing comes after."""
        own_s, after_s = self._service.of(stage), self._after.of(stage)
        share = own_s / (own_s + after_s) if own_s > 0 else 1.0
        return left_s * share

    def end(self, request: Request, service_s: float | None, now_s: float) -> None:
        """A call has ended after so many seconds of service. None: it was aborted, and nothing is learned from it."""
        query = self.programs.row_of(request)
        query.num_live -= 1
        if service_s is not None:
            self._service.note(request.stage, service_s)
            query.rounds[-1].service_s = max(query.rounds[-1].service_s, service_s)
        self.programs.leave(request, now_s)

    def _learn(self, query: _Query) -> None:
        after_s = 0.0
        for turn in reversed(query.rounds):
            for stage in sorted(turn.stages):
                self._after.note(stage, after_s)
            after_s += turn.service_s
