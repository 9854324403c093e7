"""The simulation: calls arrive, a router chooses a replica, replicas run their steps, ended calls release their
children."""

import contextlib
import dataclasses
import functools
import heapq
import itertools
import math
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxserve.cluster.router import Router, make_router
from jaxserve.cluster.snapshot import Snapshot
from jaxserve.errors import InvariantError
from jaxserve.request import Request, SamplingParams
from jaxserve.scheduler.make import make_policy
from jaxserve.scheduler.policy import Policy
from jaxserve.scheduler.progress import Progress
from jaxserve.sim.fairness import Fairness
from jaxserve.sim.record import Gaps, Record
from jaxserve.sim.replica import Replica, ReplicaSpec
from jaxserve.step import RowResult
from jaxserve.workload.call import END, After, Call, Said, Span, Workload

Watcher = Callable[[int, float], None]  # (calls that ended just now, seconds simulated)
_POLL_S = 1e-3  # an engine with work that it may not begin looks again after so long
_MOST_POLLS = 1_000_000


@dataclasses.dataclass(slots=True)
class Run:
    """What came of a simulation."""

    workload: Workload
    replicas: list[Replica]
    records: list[Record]  # in order of arrival
    gaps: Gaps
    fairness: Fairness | None = None  # if there are several clients
    end_s: float = 0.0
    is_partial: bool = False  # interrupted


def simulate(
    workload: Workload,
    specs: Sequence[ReplicaSpec],
    policy: str | Callable[[], Policy] = "fcfs",
    options: Mapping[str, Any] | None = None,
    *,
    router: str | Callable[[], Router] = "least_loaded",
    router_options: Mapping[str, Any] | None = None,
    snapshot_s: float = 0.0,
    knows_lengths: bool = False,
    watch: Watcher | None = None,
) -> Run:
    """Run a workload over one replica for each spec. Ctrl-C ends it early, with what came of it so far.

    `policy`: a name (with `options`), or a function that makes one, called once for each replica. `router`: likewise, who
    chooses among several replicas, by snapshots that are at most `snapshot_s` seconds old.
    `knows_lengths`: the scheduler is told each answer's length (as `max_tokens`, without an end token).
    """
    replicas = [Replica(index, spec, _policy(policy, options, spec)) for index, spec in enumerate(specs)]
    chooser = make_router(router, router_options) if isinstance(router, str) else router()
    return run_on(replicas, workload, router=chooser, snapshot_s=snapshot_s, knows_lengths=knows_lengths, watch=watch)


def run_on(
    replicas: Sequence[Any],
    workload: Workload,
    *,
    router: Router | None = None,
    snapshot_s: float = 0.0,
    knows_lengths: bool = False,
    watch: Watcher | None = None,
) -> Run:
    """As `simulate`, over replicas that are there already: simulated ones, or `sim.live.LiveReplica`."""
    world = _World(workload, replicas, router or make_router("least_loaded"), snapshot_s, knows_lengths)
    run = Run(workload, list(replicas), world.records, world.gaps, world.fairness)
    with _interrupts() as caught:
        try:
            run.is_partial = not world.run(watch or _watch_nothing, caught)
        except KeyboardInterrupt:
            run.is_partial = True
    run.end_s = max((replica.clock.now_s() for replica in replicas), default=0.0)
    return run


def _policy(policy: str | Callable[[], Policy], options: Mapping[str, Any] | None, spec: ReplicaSpec) -> Policy:
    if not isinstance(policy, str):
        return policy()
    capacity = spec.capacity
    return make_policy(policy, options, cost=spec.cost, capacity=capacity, rungs=capacity.token_rungs)


class _World:
    """All that changes. Events are arrivals; between two of them the replica that is furthest behind takes a step."""

    def __init__(
        self, workload: Workload, replicas: Sequence[Replica], router: Router, snapshot_s: float, knows_lengths: bool
    ):
        self.records: list[Record] = []
        self.gaps = Gaps()
        self.fairness = Fairness(workload) if len({call.client for call in workload.calls}) > 1 else None
        self._replicas = replicas
        self._router = router
        self._snapshot_s = snapshot_s
        self._seen: tuple[float, list[Snapshot]] = (-math.inf, [])  # when, and what
        self._knows_lengths = knows_lengths
        self._by_sequence: dict[str, Record] = {}
        self._events: list[tuple[float, int, Call]] = []  # heap; of one time in order of the workload
        self._numbers = {call.call_id: number for number, call in enumerate(workload.calls)}
        self._children: dict[str, list[Call]] = {}
        self._left: dict[str, int] = {}  # parents that have not ended
        self._readers: dict[str, int] = {}  # calls that are still to be made of a call's tokens
        self._open = Counter(call.program for call in workload.calls if call.program)  # calls that have not ended
        self._texts: dict[str, tuple[tuple[int, ...], int]] = {}  # of those: all tokens, and how many are the prompt
        for number, call in enumerate(workload.calls):
            parents = set(call.parents)
            for other in call.wanted:
                self._readers[other] = self._readers.get(other, 0) + 1
            if not parents:
                self._events.append((call.arrival_s, number, call))
                continue
            self._left[call.call_id] = len(parents)
            for parent in parents:
                self._children.setdefault(parent, []).append(call)
        heapq.heapify(self._events)

    def run(self, watch: Watcher, stops: Sequence[int]) -> bool:
        """Go on until nothing is left to do, or there is something in `stops`; returns whether all is done."""
        polls = 0
        while not stops:
            busy = [replica for replica in self._replicas if replica.has_work]
            if not busy and not self._events:
                return True
            replica = min(busy, key=lambda r: r.clock.now_s()) if busy else None
            next_s = self._events[0][0] if self._events else math.inf
            if replica is None or next_s <= replica.clock.now_s():
                _, _, call = heapq.heappop(self._events)
                self._arrive(call, next_s)
                continue
            before_s = replica.clock.now_s()
            progress = replica.advance()
            now_s = replica.clock.now_s()
            if self.fairness is not None and progress:
                self.fairness.note(progress, self._by_sequence)
            ended = self.gaps.note(progress, self._by_sequence, replica.executor.collected_s, now_s)
            for item in ended:
                self._end(replica, item, now_s)
            if ended:
                watch(len(ended), now_s)
            if progress or replica.is_stepping or now_s > before_s:
                polls = 0
                continue
            polls += 1
            if polls > _MOST_POLLS:
                raise InvariantError("sequences wait, and the policy admits none of them")
            replica.idle_until(min(next_s, now_s + _POLL_S))
        return False

    def _arrive(self, call: Call, now_s: float) -> None:
        num_tokens = sum(piece.length if isinstance(piece, Span) else len(self._text(piece)) for piece in call.prompt)
        record = Record(call, now_s, num_tokens)
        self.records.append(record)
        longest = max(replica.spec.max_model_len for replica in self._replicas)
        if num_tokens >= longest:  # told before so many tokens are made
            record.refused = f"a prompt of {num_tokens} tokens, and max_model_len is {longest}"
            return
        prompt = self._prompt(call)
        params = _params(call.output_tokens if self._knows_lengths else call.max_tokens, self._knows_lengths)
        request = Request(
            request_id=call.call_id,
            prompt_token_ids=prompt,
            params=params,
            arrival_s=now_s,
            eos_token_ids=(END,),
            namespace=call.namespace,
            priority=call.priority,
            client=call.client,
            program=call.program,
            parents=call.parents,
            stage=call.stage,
            deadline_s=call.deadline_s,
        )
        index = 0
        if len(self._replicas) > 1:
            index = self._router.route(request, self._snapshots(now_s), now_s)
        replica = self._replicas[index]
        record.replica = index
        if num_tokens >= replica.spec.max_model_len:
            record.refused = f"a prompt of {num_tokens} tokens, and max_model_len is {replica.spec.max_model_len}"
            self._router.finish(call.call_id, 0)
            return
        if self.fairness is not None:
            self.fairness.arrive(call.client)
        token = RowResult(token_id=-1 - self._numbers[call.call_id])
        self._by_sequence[replica.add(request, token, call.output_tokens)] = record

    def _snapshots(self, now_s: float) -> list[Snapshot]:
        """What the router sees."""
        if now_s - self._seen[0] >= self._snapshot_s:
            self._seen = now_s, [replica.snapshot(now_s) for replica in self._replicas]
        return self._seen[1]

    def _text(self, piece: After | Said) -> tuple[int, ...]:
        """The tokens of an earlier call."""
        tokens, num_prompt = self._texts[piece.call_id]
        return tokens if isinstance(piece, After) else tokens[num_prompt:]

    def _prompt(self, call: Call) -> tuple[int, ...]:
        """The tokens of a call's prompt. Texts that nobody needs any more are forgotten."""
        parts = [
            (piece.token,) * piece.length if isinstance(piece, Span) else self._text(piece) for piece in call.prompt
        ]
        for other in call.wanted:
            self._readers[other] -= 1
            if not self._readers[other]:
                del self._texts[other]
        return parts[0] if len(parts) == 1 else tuple(itertools.chain.from_iterable(parts))

    def _close(self, call: Call, now_s: float) -> None:
        """One call of a program less; after the last everybody may forget the program."""
        if call.program:
            self._open[call.program] -= 1
            if not self._open[call.program]:
                self._router.end_program(call.program)
                for replica in self._replicas:
                    replica.scheduler.end_program(call.program, now_s)

    def _end(self, replica: Replica, item: Progress, now_s: float) -> None:
        sequence = item.sequence
        replica.forget(sequence)
        record = self._by_sequence.pop(sequence.seq_id)
        record.finish, record.finish_s = item.finish, now_s
        record.num_preemptions = sequence.view.num_preemptions
        call = record.call
        if len(self._replicas) > 1:
            self._router.finish(call.call_id, record.num_output)
        self._close(call, now_s)
        if self._readers.get(call.call_id):
            self._texts[call.call_id] = tuple(sequence.tokens), sequence.num_prompt
        for child in self._children.pop(call.call_id, ()):
            self._left[child.call_id] -= 1
            if not self._left[child.call_id]:
                arrival_s = max(child.arrival_s, now_s + child.think_s)
                heapq.heappush(self._events, (arrival_s, self._numbers[child.call_id], child))


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C, as something in the list: an exception may come where it is lost, since JAX has the garbage collector call it
    back. The second Ctrl-C is one."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, frame: object) -> None:
        del frame
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)


@functools.lru_cache(maxsize=4096)
def _params(max_tokens: int | None, ignore_eos: bool) -> SamplingParams:
    """Checked once for each limit, not once for each call."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos)


def _watch_nothing(ended: int, now_s: float) -> None:
    del ended, now_s
