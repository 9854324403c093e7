"""An engine without a device: a pretend executor whose answers depend on every token it can read through a table.

A block that is stale, lost, shared by mistake or copied too late changes the answer, and `alone` says what the answer
had to be. No jax.
"""

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxserve.clock import VirtualClock
from jaxserve.cost.forms import Fitted
from jaxserve.cost.model import CostModel
from jaxserve.engine import Engine
from jaxserve.errors import DeviceError
from jaxserve.kv.store import KVStore
from jaxserve.output import Event, RequestOutput
from jaxserve.request import Request, SamplingParams, Task
from jaxserve.scheduler.core import Scheduler
from jaxserve.scheduler.make import make_policy
from jaxserve.step import Capacity, Row, RowResult, SlotStart, StepPlan, StepResult, TokenLogprob

EOS = 0
# Pieces of several characters, so that stop strings begin and end inside tokens.
PIECES = (
    "<eos>",
    "a",
    "b",
    "c",
    "ab",
    "ba",
    "abc",
    " ",
    "x",
    "y",
    "xy",
    "yx",
    "cab",
    "é",
    ". ",
    "\n",
    "q",
    "w",
    "e",
    "r",
)
VOCAB_SIZE = len(PIECES)
# Pretend steps: 10 ms, and 1 ms for each token, more the further on it is.
COST = CostModel(
    name="pretend",
    device=Fitted(decode=((0, 0.01), (1, 0.011)), mixed=((0, 0.01), (1, 0.011)), decode_kv_s=1e-5, pair_s=1e-5),
)


def next_token(
    tokens: Sequence[int],
    params: SamplingParams,
    seed: int,
    index: int,
    banned: Iterable[int],
    mask: bytes | None = None,
) -> int:
    """The pretend model: a fixed function of the whole context, the random key if there is one, and what is held back."""
    key = (seed % (1 << 32), index) if params.temperature > 0 else ()
    token, held_back = hash((tuple(tokens), key)) % VOCAB_SIZE, set(banned)
    if mask is not None:
        masked = {t for t in range(VOCAB_SIZE) if not mask[t // 8] >> t % 8 & 1}
        assert len(masked) < VOCAB_SIZE, "nothing may follow"
        held_back = held_back | masked if len(held_back | masked) < VOCAB_SIZE else masked
    while token in held_back:
        token = (token + 1) % VOCAB_SIZE
    return token


@dataclasses.dataclass(frozen=True, slots=True)
class FakeGrammar:
    """Some tokens may follow, which ones depends on all before; `length` of them are an answer, from half of that on it may
    end. At `breaks_at` tokens it breaks."""

    salt: int = 0
    length: int = 8
    breaks_at: int = -1

    def start(self) -> "FakeGuide":
        return FakeGuide(self)


class FakeGuide:
    """Insists that it sees every token of its answer once, in order, and none that it did not allow."""

    def __init__(self, grammar: FakeGrammar):
        self._grammar = grammar
        self.tokens: list[int] = []

    @property
    def is_done(self) -> bool:
        return len(self.tokens) >= self._grammar.length

    @property
    def error(self) -> str:
        return "it breaks" if len(self.tokens) == self._grammar.breaks_at else ""

    def mask(self) -> bytes:
        return sum(1 << token for token in self._allowed()).to_bytes(4, "little")

    def advance(self, token_id: int) -> None:
        assert token_id in self._allowed()
        self.tokens.append(token_id)

    def _allowed(self) -> set[int]:
        seen = (self._grammar.salt, *self.tokens)
        allowed = {token for token in range(1, VOCAB_SIZE) if hash((*seen, token)) % 4 == 0} or {1}
        return allowed | {EOS} if 2 * len(self.tokens) >= self._grammar.length else allowed


def score(tokens: Sequence[int], target: int, count: int) -> TokenLogprob:
    """The pretend log-probability of `target` after `tokens`, with `count` alternatives."""
    value = -(hash((tuple(tokens), target)) % 997) / 100
    return TokenLogprob(target, value, 1, tuple(range(count)), tuple(-float(i) for i in range(count)))


def edited(tokens: Sequence[int], history: Sequence[int], params: SamplingParams) -> tuple[int, ...]:
    """Penalties and bias depend on history kept in the slot: make the answer depend on it, too."""
    return (*tokens, -1, *history) if params.has_edits else tuple(tokens)


class FakeExecutor:
    """Runs plans in the order of dispatch over a pool of token ids, and refuses plans that break a law of `StepPlan`.

    `fail_next` ("dispatch" or "collect") makes the next call of that name fail, and everything written is lost.
    """

    def __init__(self, capacity: Capacity):
        self.plans: list[StepPlan] = []
        self.fail_next = ""
        self._capacity = capacity
        self._forget()

    def capacity(self) -> Capacity:
        return self._capacity

    def _forget(self) -> None:
        capacity = self._capacity
        places = itertools.product(range(capacity.num_replicas), range(capacity.num_blocks))
        self._pool: dict[tuple[int, int], list[int | None]] = {place: [None] * capacity.block_size for place in places}
        self._last: dict[tuple[int, int], tuple[str, int]] = {}  # (replica, slot) -> who sampled what there
        self._history: dict[tuple[int, int], list[int]] = {}
        self._host: dict[tuple[int, int], list[int | None]] = {}  # (replica, block of host memory) -> tokens
        self._prefetched: dict[tuple[int, int], list[int | None]] = {}
        self._under_way: deque[StepPlan] = deque()

    def _may_fail(self, name: str) -> None:
        if self.fail_next == name:
            self.fail_next = ""
            self._forget()
            raise DeviceError(f"{name} failed")

    def dispatch(self, plan: StepPlan) -> tuple[StepPlan, StepResult]:
        self._may_fail("dispatch")
        assert plan.rows, "an empty plan"
        slots, ids = [_slot(row) for row in plan.rows], [row.seq_id for row in plan.rows]
        targets = [(copy.replica, copy.target) for copy in plan.copies]
        ins = [(swap.replica, swap.device) for swap in plan.swap_ins]
        for values in (slots, ids, targets, ins):
            assert len(set(values)) == len(values), f"twice in one plan: {values}"
        for out in plan.swap_outs:
            self._host[out.replica, out.host] = list(self._pool[out.replica, out.device])
        for swap in plan.swap_ins:
            tokens = self._host[swap.replica, swap.host]
            assert self._prefetched.get((swap.replica, swap.host), tokens) == tokens, "changed on its way"
            self._pool[swap.replica, swap.device] = list(tokens)
        self._prefetched = {(s.replica, s.host): list(self._host[s.replica, s.host]) for s in plan.prefetches}
        for copy in plan.copies:
            self._pool[copy.replica, copy.target] = list(self._pool[copy.replica, copy.source])
        for start in plan.starts:
            self._history[_slot(start)] = list(start.output_token_ids)
        written: dict[tuple[int, int, int], str] = {}
        for row in plan.rows:
            self._write(row, written)
        for row in plan.rows:  # nobody reads what another row of the same step writes
            for position in range(row.start):
                assert written.get(self._place(row, position), row.seq_id) == row.seq_id
        self.plans.append(plan)
        self._under_way.append(plan)
        assert len(self._under_way) <= 2, "more than one step ahead"
        return plan, StepResult(rows=tuple(self._run(row) for row in plan.rows))

    def collect(self, pending: tuple[StepPlan, StepResult]) -> StepResult:
        self._may_fail("collect")
        assert self._under_way.popleft() is pending[0], "collected out of order"
        return pending[1]

    def _place(self, row: Row, position: int) -> tuple[int, int, int]:
        index, offset = divmod(position, self._capacity.block_size)
        return row.replica, row.blocks[index], offset

    def _write(self, row: Row, written: dict[tuple[int, int, int], str]) -> None:
        assert row.num_tokens > 0
        assert 0 <= row.slot < self._capacity.num_slots
        assert len(set(row.blocks)) == len(row.blocks), "a block twice in one table"
        assert row.start + row.num_tokens <= self._capacity.max_model_len
        inputs = list(row.token_ids)
        if row.feeds_last:
            owner, token = self._last[_slot(row)]
            assert owner == row.seq_id, "the slot's last token is another sequence's"
            inputs.append(token)
        for position, token in enumerate(inputs, start=row.start):
            place = self._place(row, position)
            assert place not in written, "two rows write one place"
            written[place] = row.seq_id
            self._pool[place[:2]][place[2]] = token

    def _run(self, row: Row) -> RowResult:
        read = [self._pool[place[:2]][place[2]] for place in (self._place(row, p) for p in range(_end(row)))]
        assert None not in read, f"{row.seq_id} reads position {read.index(None)}, which was never written"
        tokens = [token for token in read if token is not None]
        scores = None
        if row.logprob_targets is not None:
            assert len(row.logprob_targets) == row.num_tokens
            count = row.params.prompt_logprobs or 0
            scores = tuple(
                score(tokens[: row.start + i + 1], target, count) if target >= 0 else None
                for i, target in enumerate(row.logprob_targets)
            )
        if not row.samples or row.task is not Task.GENERATE:
            hidden: Any = tuple(tokens) if row.task is Task.EMBED and row.samples else None
            return RowResult(prompt_logprobs=scores, hidden=hidden)
        context = edited(tokens, self._history.get(_slot(row), []), row.params)
        token = next_token(context, row.params, row.seat.seed, row.output_index, row.banned, row.mask)
        self._last[_slot(row)] = row.seq_id, token
        self._history.setdefault(_slot(row), []).append(token)
        wanted = row.params.logprobs
        return RowResult(
            token_id=token,
            logprob=None if wanted is None else score(tokens, token, wanted),
            prompt_logprobs=scores,
        )


def _slot(taker: Row | SlotStart) -> tuple[int, int]:
    return taker.replica, taker.slot


def _end(row: Row) -> int:
    return row.start + row.num_tokens


class FakeTokenizer:
    """Token id -> a fixed piece of text."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(PIECES[t] for t in token_ids if not (skip_special_tokens and t == EOS))

    def detokenizer(self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> "FakeDetokenizer":
        del prompt_token_ids
        return FakeDetokenizer(skip_special_tokens)


class FakeDetokenizer:
    """Pieces as they are; an `é` is held back for one push, as a split character would be."""

    def __init__(self, skip_special_tokens: bool):
        self._skip = skip_special_tokens
        self._held = ""

    def push(self, token_id: int) -> str:
        piece = "" if self._skip and token_id == EOS else PIECES[token_id]
        text = self._held + piece
        self._held = "é" if text.endswith("é") else ""
        return text.removesuffix("é") if self._held else text

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


@dataclasses.dataclass(slots=True)
class Rig:
    """An engine and what it is made of."""

    engine: Engine
    scheduler: Scheduler
    stores: list[KVStore]
    executor: FakeExecutor
    clock: VirtualClock

    @property
    def store(self) -> KVStore:
        """The only one."""
        (store,) = self.stores
        return store

    def step(self) -> list[Event]:
        """One step, then the books."""
        events = self.engine.step()
        self.clock.advance(0.01)
        self.scheduler.check()
        return events

    def run(self, *requests: Request, max_steps: int = 20_000) -> dict[str, RequestOutput]:
        """Answer requests, and prove that nothing is left behind."""
        for request in requests:
            self.engine.add(request)
        outputs = {}
        for _ in range(max_steps):
            if not self.engine.has_work:
                break
            outputs |= {event.request_id: event.output for event in self.step()}
        self.check_empty()
        return outputs

    def check_empty(self) -> None:
        """Nothing queued, no block held, no slot taken."""
        assert not self.engine.has_work, "the engine did not come to an end"
        assert self.scheduler.num_running == self.scheduler.num_waiting == self.scheduler.num_held_blocks == 0


def make_engine(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    num_slots: int = 8,
    budget: int = 32,
    max_model_len: int = 64,
    rungs: tuple[int, ...] = (8, 16, 32),
    overlap: bool = True,
    chunked: bool = True,
    caching: bool = True,
    policy: str = "fcfs",
    num_replicas: int = 1,
    num_host_blocks: int = 0,
    tokenizer: Any = None,
    options: Mapping[str, Any] | None = None,
    cost: CostModel = COST,
    **scheduler_options: Any,
) -> Rig:
    """An engine over a FakeExecutor. Blocks, slots and budget are those of each replica."""
    capacity = Capacity(num_blocks, block_size, num_slots, rungs, max_model_len, num_replicas, num_host_blocks)
    executor = FakeExecutor(capacity)
    stores = [KVStore(num_blocks, block_size, caching=caching) for _ in range(num_replicas)]
    made = make_policy(policy, options, cost=cost, capacity=capacity, rungs=rungs)
    scheduler = Scheduler(stores, made, capacity, token_budget=budget, chunked=chunked, **scheduler_options)
    clock = VirtualClock()
    engine = Engine(
        scheduler,
        executor,
        tokenizer or FakeTokenizer(),  # pyright: ignore[reportArgumentType]
        clock=clock,
        vocab_size=VOCAB_SIZE,
        max_model_len=max_model_len,
        overlap=overlap,
    )
    return Rig(engine, scheduler, stores, executor, clock)


def ask(request_id: str, prompt: Sequence[int], **options: Any) -> Request:
    """A request; names of `Request` fields go there, all others into its SamplingParams (greedy by default)."""
    fields = {field.name for field in dataclasses.fields(Request)}
    params = SamplingParams(**{"temperature": 0.0} | {k: v for k, v in options.items() if k not in fields})
    rest: dict[str, Any] = {"eos_token_ids": (EOS,)} | {k: v for k, v in options.items() if k in fields}
    if params.prompt_logprobs is not None:
        rest.setdefault("logprobs_from", 1)
    return Request(request_id=request_id, prompt_token_ids=tuple(prompt), params=params, **rest)


@dataclasses.dataclass(frozen=True, slots=True)
class Expected:
    """What one answer must be."""

    token_ids: list[int]
    text: str
    finish_reason: str
    stop_reason: int | str | None


def alone(request: Request, index: int = 0, *, max_model_len: int = 64) -> Expected:
    """The answer computed straight from the pretend model: no blocks, no batch, no steps."""
    params, prompt = request.params, request.prompt_token_ids
    room = min(params.max_tokens or math.inf, max_model_len - len(prompt))
    output, text = list[int](), ""
    guide = request.grammar.start() if request.grammar is not None else None
    while True:
        banned = _banned(request, output)
        seed = (params.seed or 0) + index
        context, mask = edited((*prompt, *output), output, params), None if guide is None else guide.mask()
        token = next_token(context, params, seed, len(output), banned, mask)
        output.append(token)
        ends = set() if params.ignore_eos and guide is None else set(request.eos_token_ids)
        stop_tokens = set(params.stop_token_ids) | ends
        if token in stop_tokens and not params.include_stop_str_in_output:
            return Expected(output, text, "stop", token if token in params.stop_token_ids else None)
        before, text = text, text + ("" if token == EOS and params.skip_special_tokens else PIECES[token])
        found = [(text.find(s, max(len(before) - len(s) + 1, 0)), s) for s in params.stop]
        found = [f for f in found if f[0] >= 0 and len(output) >= params.min_tokens]
        if found:
            begin, stop = min(found)
            end = begin + (len(stop) if params.include_stop_str_in_output else 0)
            return Expected(output, text[:end], "stop", stop)
        if token in stop_tokens:
            return Expected(output, text, "stop", token if token in params.stop_token_ids else None)
        if guide is not None:
            guide.advance(token)
            if guide.is_done or guide.error:
                return Expected(output, text, "stop" if guide.is_done else "error", None)
        if len(output) >= room:
            return Expected(output, text, "length", None)


def _banned(request: Request, output: list[int]) -> set[int]:
    banned = set()
    if len(output) < request.params.min_tokens:
        banned |= {*request.eos_token_ids, *request.params.stop_token_ids}
    for *begun, last in request.bad_word_ids:
        if output[len(output) - len(begun) :] == begun:
            banned.add(last)
    return banned


def check_answer(output: RequestOutput, request: Request, *, max_model_len: int = 64) -> None:
    """Every answer of a request is what it would have been alone."""
    assert len(output.outputs) == request.params.n
    for index, answer in enumerate(output.outputs):
        expected = alone(request, index, max_model_len=max_model_len)
        got = Expected(answer.token_ids, answer.text, str(answer.finish_reason), answer.stop_reason)
        assert got == expected, f"{request.request_id}/{index}: {got} instead of {expected}"
