"""Which replica takes the next request: a rule by name, over snapshots that are brought up to date.

A snapshot is old when it is read. Requests that were sent since then would all go to the replica that looked best (Llumnix
calls for a local correction, OSDI 2024, arXiv 2406.03243), so the router adds to each snapshot what it has sent and the
replica had not taken in yet; and prompts that are being computed count as cached where they are computed. Rules see only
snapshots that are corrected so, of replicas that take requests.
"""

import dataclasses
import importlib
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxserve.cluster.prefixes import Prefixes
from jaxserve.cluster.rule import Rule
from jaxserve.cluster.snapshot import Snapshot
from jaxserve.config import from_options, reject_unknown
from jaxserve.errors import InvariantError, RequestError
from jaxserve.request import Request

# One file each; a new one is found by being there.
ROUTERS = tuple(sorted(path.stem for path in (Path(__file__).parent / "routers").glob("[a-z]*.py")))
_MOST_LIVE = 100_000  # requests that have not ended; of more, the oldest are taken for lost


def make_router(name: str, options: Mapping[str, Any] | None = None) -> "Router":
    """The router of that name. `options` are the fields of its rule's dataclass.

    Raises:
      ConfigError: no such router or option, or a value that cannot be.
    """
    reject_unknown([name], ROUTERS, what="router")
    module = importlib.import_module(f"jaxserve.cluster.routers.{name}")
    return Router(from_options(getattr(module, name.title().replace("_", "")), options, what=f"router {name!r}"))


class _Sent(NamedTuple):
    """What a request adds to the snapshot of a replica that has not taken it in."""

    blocks: int
    tokens: int
    work_s: float
    is_urgent: bool


class _Line:
    """What is on its way to one replica, in the order of sending."""

    __slots__ = ("num_accepted", "sent")

    def __init__(self, num_accepted: int):
        self.num_accepted = num_accepted
        self.sent: deque[_Sent] = deque()

    def see(self, num_accepted: int) -> None:
        """A snapshot says how many requests it holds. Fewer than before: the replica has started anew."""
        num_new = num_accepted - self.num_accepted
        for _ in range(len(self.sent) if num_new < 0 else min(num_new, len(self.sent))):
            self.sent.popleft()
        self.num_accepted = num_accepted


class Router:
    """Sends requests by one rule. The same calls in the same order give the same answers.

    `num_accepted` tells what a snapshot holds, so a router must be the only one of its replicas to be exact; beside
    others it sees some of what it has sent too late or too early.
    """

    def __init__(self, rule: Rule):
        self._rule = rule
        self._lines: dict[int, _Line] = {}
        self._live: OrderedDict[str, tuple[Request, int]] = OrderedDict()  # by request id: where it went
        self._prefixes = Prefixes() if rule.asks_cached else None

    def route(self, request: Request, snapshots: Sequence[Snapshot], now_s: float) -> int:
        """The number of the replica that a request is sent to, which the caller does at once.

        Draining replicas get nothing, and those whose pool can never hold the prompt only if no pool can.

        Raises:
          RequestError: no replica takes requests.
          InvariantError: two snapshots of one replica.
        """
        takers = sorted((s for s in snapshots if not s.is_draining), key=lambda snapshot: snapshot.replica)
        if len({snapshot.replica for snapshot in snapshots}) < len(snapshots):
            raise InvariantError(f"a replica twice: {[snapshot.replica for snapshot in snapshots]}")
        if not takers:
            state = f"all {len(snapshots)} replicas are draining" if snapshots else "there are no replicas"
            raise RequestError(f"nobody takes the request: {state}", remedy="Send it again later")
        if request.request_id in self._live:  # sent again, since a replica was lost
            self.finish(request.request_id, 0)
        num_tokens = len(request.prompt_token_ids) + 1
        roomy = [s for s in takers if s.blocks_for(num_tokens) <= s.num_blocks]
        choice = self._rule.choose(request, self._corrected(request, roomy or takers), now_s)
        self._send(request, choice)
        return choice.replica

    def finish(self, request_id: str, num_output: int) -> None:
        """A request has ended, by itself or not, after so many tokens of its answer. Unknown ones are ignored."""
        request, replica = self._live.pop(request_id, (None, 0))
        if request is not None:
            self._rule.on_finish(request, replica, num_output)
            if self._prefixes is not None:
                self._prefixes.remove(request_id)

    def end_program(self, program: str) -> None:
        """No more requests of a program will come."""
        self._rule.on_program_end(program)

    def _corrected(self, request: Request, snapshots: Sequence[Snapshot]) -> list[Snapshot]:
        corrected = list[Snapshot]()
        under_way = None if self._prefixes is None else self._prefixes.matches(request)
        for snapshot in snapshots:
            line = self._lines.setdefault(snapshot.replica, _Line(snapshot.num_accepted))
            line.see(snapshot.num_accepted)
            changes = _additions(snapshot, line.sent) if line.sent else {}
            if under_way is not None and under_way.get(snapshot.replica):
                changes["cached"] = _at_least(under_way[snapshot.replica], request, snapshot)
            corrected.append(dataclasses.replace(snapshot, **changes) if changes else snapshot)
        return corrected

    def _send(self, request: Request, snapshot: Snapshot) -> None:
        num_tokens = len(request.prompt_token_ids)
        sent = _Sent(snapshot.blocks_for(num_tokens + 1), num_tokens, snapshot.service_s(request), request.priority < 0)
        self._lines[snapshot.replica].sent.append(sent)
        self._live[request.request_id] = request, snapshot.replica
        if self._prefixes is not None:
            self._prefixes.add(request, snapshot.replica)
        if len(self._live) > _MOST_LIVE:
            self.finish(next(iter(self._live)), 0)


def _additions(snapshot: Snapshot, sent: Sequence[_Sent]) -> dict[str, Any]:
    return {
        "num_waiting": snapshot.num_waiting + len(sent),
        "num_urgent": snapshot.num_urgent + sum(each.is_urgent for each in sent),
        "waiting_blocks": snapshot.waiting_blocks + sum(each.blocks for each in sent),
        "first_waiting_blocks": snapshot.first_waiting_blocks or sent[0].blocks,
        "queued_tokens": snapshot.queued_tokens + sum(each.tokens for each in sent),
        "work_s": snapshot.work_s + sum(each.work_s for each in sent),
    }


def _at_least(num_tokens: int, request: Request, snapshot: Snapshot) -> Any:
    """`Snapshot.cached`, for this request's prompt never less than what is under way."""

    def cached(tokens: Sequence[int], namespace: str) -> int:
        found = snapshot.cached(tokens, namespace)
        return max(found, num_tokens) if tokens is request.prompt_token_ids else found

    return cached
