"""The executor of this process's devices: owns weights, KV pages and sampler state, and the compiled steps."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxserve.executor.compiles import count_compiles
from jaxserve.executor.experts import ExpertBook
from jaxserve.executor.failure import explain
from jaxserve.executor.inputs import empty_inputs, make_inputs, places
from jaxserve.executor.ladder import Rung, fit, token_rungs
from jaxserve.executor.program import (
    DeviceState,
    StepOutputs,
    jit_copy,
    jit_masks,
    jit_repack,
    jit_start,
    jit_step,
    shardings,
)
from jaxserve.executor.program_store import Program, ProgramStore
from jaxserve.executor.swap import HostPool
from jaxserve.models.batch import TokenBatch
from jaxserve.models.config import ModelConfig
from jaxserve.models.moe import Placement
from jaxserve.models.registry import ModelFamily
from jaxserve.pallas_kernels.ragged_paged_attention import checks
from jaxserve.request import Task
from jaxserve.sampling.sampler import Logprobs
from jaxserve.step import BlockCopy, Capacity, Row, RowResult, SlotStart, StepPlan, StepResult, TokenLogprob

_COPIES = 16  # block copies per call
_MASKS = 8  # masks per call
_HISTORY = 512  # history tokens per call when a slot starts


@dataclasses.dataclass(frozen=True, slots=True)
class Pending:
    """A step under way."""

    plan: StepPlan
    rung: Rung
    outputs: StepOutputs


class LocalExecutor:
    """See `executor.base.Executor`. Steps are dispatched asynchronously; the device runs them in order."""

    def __init__(
        self,
        family: ModelFamily,
        cfg: ModelConfig,
        params: Any,
        empty_state: Callable[[], DeviceState],
        ladder: tuple[Rung, ...],
        *,
        max_model_len: int,
        attention_backend: str | None,
        mesh: Mesh | None = None,
        experts: ExpertBook | None = None,
        num_host_blocks: int = 0,
        store: ProgramStore | None = None,
    ):
        """`params` lie on the mesh; `empty_state` makes arrays for all of its replicas; `experts` if the model has any;
        `num_host_blocks` of each replica can be swapped out; `store` keeps programs between runs."""
        self._params, self._ladder, self._store = params, ladder, store
        self._num_replicas = 1 if mesh is None else mesh.shape["data"]
        shapes = jax.eval_shape(empty_state)
        empty = Program(jax.jit(empty_state, out_shardings=shardings(shapes, mesh)), ())
        self._empty_state = self._compile(("empty", shapes), empty)
        self._state = self._empty_state()
        self._max_model_len = max_model_len
        self._num_slots = self._state.sampler.last_r.shape[0] // self._num_replicas
        self._num_blocks = self._state.kv.num_blocks // self._num_replicas
        self._sizes = {
            "table_width": -(-max_model_len // self._state.kv.block_size),
            "num_slots": self._num_slots,
            "vocab_size": self._state.sampler.counts_rv.shape[1],
            "num_replicas": self._num_replicas,
        }
        self._jitted_step = jit_step(family, cfg, attention_backend, params, shapes, mesh)
        self._experts, self._mesh = experts, mesh
        self._jitted_copy = jit_copy(shapes, mesh)
        self._jitted_start = jit_start(shapes, mesh)
        self._jitted_masks = jit_masks(shapes, mesh)
        self._num_host_blocks = num_host_blocks
        self._host = HostPool(shapes, mesh, self._num_replicas, num_host_blocks) if num_host_blocks else None
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.num_late_compiles = 0  # compilations while dispatching: a bug if not 0
        self.steps_by_scheme: Counter[str] = Counter()  # of prompts whose attention was shared by a scheme of its own

    def capacity(self) -> Capacity:
        """Pool, slots and compiled step sizes."""
        return Capacity(
            num_blocks=self._num_blocks,
            block_size=self._state.kv.block_size,
            num_slots=self._num_slots,
            token_rungs=token_rungs(self._ladder),
            max_model_len=self._max_model_len,
            num_replicas=self._num_replicas,
            num_host_blocks=self._num_host_blocks,
        )

    def warm_up(self, *, progress: bool) -> None:
        """Compile everything that can ever run, so that nothing compiles later."""
        programs = self._programs()

        def compile_one(name: Any) -> tuple[Any, Callable[..., Any]]:
            return name, self._compile(name, programs[name])

        with ThreadPoolExecutor(max_workers=2) as pool:
            done = pool.map(compile_one, sorted(programs, key=_cost_of, reverse=True))
            bar = tqdm(done, total=len(programs), desc="warming up", unit="shape", disable=not progress, leave=False)
            self._compiled = dict(bar)
        if self._host is not None:
            self._host.use(self._compiled)
        if self._store is not None:
            self._store.trim()

    def dispatch(self, plan: StepPlan) -> Pending:
        """Copies, slot starts, masks, then the step itself; returns before the device is done.

        With JAX's debug checks on, raises ValueError for a plan that points outside of the pool, before anything runs.
        """
        rung = fit(self._ladder, plan.loads)
        inputs = make_inputs(plan, rung, **self._sizes)
        if checks.wanted():
            self._check_rows(inputs.batch, rung)
        with self._losing_state_on_failure(plan):
            if self._state.kv.pages_pkbd.is_deleted():  # by a step that failed
                self._state = self._empty_state()
            compiles = count_compiles()
            self._swap_blocks(plan)
            self._copy_blocks(plan.copies)
            for start in plan.starts:
                self._start_slot(start)
            self._set_masks(plan)
            self._move_experts(plan.index)
            outputs, self._state = self._compiled[rung](self._params, self._state, inputs, self._placement)
            self.num_late_compiles += count_compiles() - compiles
            if rung.scheme is not None:
                self.steps_by_scheme[rung.scheme] += 1
        return Pending(plan, rung, outputs)

    def collect(self, pending: Pending) -> StepResult:
        """Fetch a step's tokens, and what else its rows asked for."""
        with self._losing_state_on_failure(pending.plan):
            if self._experts is not None:
                self._experts.note(np.asarray(pending.outputs.experts_1lx))
            result = self._fetch_result(pending)
            if self._host is not None:
                self._host.settle(pending.plan.index)
            return result

    def metrics(self) -> dict[str, Any]:
        """What the steps so far have shown of compilation, schemes and experts."""
        return {
            "compiles_after_ready": self.num_late_compiles,
            "programs_from_disk": 0 if self._store is None else len(self._store.loaded),
            "steps_by_scheme": dict(self.steps_by_scheme),
        } | (self._experts.metrics() if self._experts is not None else {})

    @contextlib.contextmanager
    def _losing_state_on_failure(self, plan: StepPlan) -> Iterator[None]:
        """Turn any failure into a DeviceError. The state was donated to the step, so none of it can be trusted after."""
        try:
            yield
        except Exception as error:  # the device, its driver or XLA may raise anything
            for array in jax.tree.leaves(self._state):
                array.delete()
            if self._host is not None:
                self._host.forget()
            raise explain(error, plan) from error

    def _fetch_result(self, pending: Pending) -> StepResult:
        plan, rung, outputs = pending.plan, pending.rung, pending.outputs
        tokens = np.asarray(outputs.token_s).tolist()
        wants_logprobs = any(row.samples and row.params.logprobs is not None for row in plan.rows)
        sampled = _fetch(outputs.logprobs) if wants_logprobs else None
        prompt = _fetch(outputs.prompt) if any(row.logprob_targets for row in plan.rows) else None
        hidden = np.asarray(outputs.hidden_se) if any(row.task is Task.EMBED for row in plan.rows) else None
        results = []
        for row, place in zip(plan.rows, places(plan, rung), strict=True):
            token = tokens[place.row]
            wants = sampled is not None and row.samples and row.params.logprobs is not None
            results.append(
                RowResult(
                    token_id=token if row.samples else None,
                    logprob=_logprob(sampled, place.row, token, row.params.logprobs or 0) if wants else None,
                    prompt_logprobs=_prompt_scores(row, prompt, place.score) if row.logprob_targets else None,
                    hidden=hidden[place.row].copy() if hidden is not None and row.task is Task.EMBED else None,
                )
            )
        return StepResult(rows=tuple(results), padded_tokens=self._num_replicas * rung.tokens - plan.num_tokens)

    def _check_rows(self, batch: TokenBatch[Any], rung: Rung) -> None:
        def parts(array: np.ndarray) -> list[np.ndarray]:
            return np.split(array, self._num_replicas)

        for rows in zip(parts(batch.table_sm), parts(batch.q_start_s), parts(batch.kv_len_s), strict=True):
            checks.check_rows(
                *rows, num_tokens=rung.tokens, num_pages=self._num_blocks, page_size=self._state.kv.block_size
            )

    def _programs(self) -> dict[Any, Program]:
        """All that can ever run, by name."""
        kv, slots = self._state.kv, self._state.sampler
        programs: dict[Any, Program] = {}
        for rung in self._ladder:
            inputs = empty_inputs(rung, **self._sizes)
            programs[rung] = Program(self._jitted_step, (self._params, self._state, inputs, self._placement))
        pairs = np.zeros(self._num_replicas * _COPIES, np.int32)
        programs["copy"] = Program(self._jitted_copy, (kv, pairs, pairs))
        programs["start"] = Program(self._jitted_start, (slots, *_history_chunk(0, True, 0.0, (), (), (), 0)))
        programs["masks"] = Program(self._jitted_masks, (slots, *self._empty_masks()))
        if self._host is not None:
            programs |= self._host.programs(kv)
        if self._experts is not None and self._experts.placement is not None:
            moe = self._params.layers[self._experts.layers[0]].mlp
            source_s = np.arange(self._experts.plan.expert_ls.shape[1], dtype=np.int32)
            programs["repack"] = Program(jit_repack(moe, self._mesh), (moe, source_s))
        return programs

    def _compile(self, name: Any, program: Program) -> Callable[..., Any]:
        return program.lower().compile() if self._store is None else self._store.get(name, program)

    @property
    def _placement(self) -> Placement[Any] | None:
        return None if self._experts is None else self._experts.placement

    def _move_experts(self, num_steps: int) -> None:
        source_ls = None if self._experts is None else self._experts.next_sources(num_steps)
        if self._experts is None or source_ls is None:
            return
        layers = list(self._params.layers)
        for index, source_s in zip(self._experts.layers, source_ls, strict=True):
            moe = self._compiled["repack"](layers[index].mlp, source_s)
            layers[index] = dataclasses.replace(layers[index], mlp=moe)
        self._params = dataclasses.replace(self._params, layers=tuple(layers))

    def _swap_blocks(self, plan: StepPlan) -> None:
        if self._host is None:
            return
        if plan.swap_outs:
            self._host.take_out(self._state.kv, plan.swap_outs, plan.index)
        if plan.swap_ins:
            self._state = self._state._replace(kv=self._host.bring_in(self._state.kv, plan.swap_ins))
        if plan.prefetches:
            self._host.prefetch(plan.prefetches)

    def _copy_blocks(self, copies: tuple[BlockCopy, ...]) -> None:
        """Each call copies up to `_COPIES` blocks of every replica; unused pairs point past the pool."""
        left = [[copy for copy in copies if copy.replica == replica] for replica in range(self._num_replicas)]
        while any(left):
            source = np.zeros((self._num_replicas, _COPIES), np.int32)
            target = np.full((self._num_replicas, _COPIES), self._num_blocks, np.int32)
            for replica, some in enumerate(left):
                for index, copy in enumerate(some[:_COPIES]):
                    source[replica, index], target[replica, index] = copy.source, copy.target
            left = [some[_COPIES:] for some in left]
            kv = self._compiled["copy"](self._state.kv, source.reshape(-1), target.reshape(-1))
            self._state = self._state._replace(kv=kv)

    def _start_slot(self, start: SlotStart) -> None:
        allowed, bias = start.params.allowed_token_ids, start.params.logit_bias or {}
        floor = 0.0 if allowed is None else -np.inf
        listed = dict.fromkeys(allowed, 0.0) if allowed is not None else {}
        listed |= {token: amount for token, amount in bias.items() if allowed is None or token in listed}
        pairs = tuple(listed.items())
        longest = max(len(start.prompt_token_ids), len(start.output_token_ids), len(pairs), 1)
        for begin in range(0, longest, _HISTORY):
            part = slice(begin, begin + _HISTORY)
            chunk = _history_chunk(
                start.replica * self._num_slots + start.slot,
                begin == 0,
                floor,
                start.prompt_token_ids[part],
                start.output_token_ids[part],
                pairs[part],
                self._sizes["vocab_size"],
            )
            self._state = self._state._replace(sampler=self._compiled["start"](self._state.sampler, *chunk))

    def _set_masks(self, plan: StepPlan) -> None:
        """Each call brings the masks of up to `_MASKS` rows of every replica; unused ones go to a slot that is none."""
        left = [
            [row for row in plan.rows if row.mask is not None and row.replica == replica]
            for replica in range(self._num_replicas)
        ]
        while any(left):
            slot_c, masks_cw = self._empty_masks()
            for replica, some in enumerate(left):
                for index, row in enumerate(some[:_MASKS], start=replica * _MASKS):
                    words = np.frombuffer(row.mask or b"", np.uint32)
                    slot_c[index], masks_cw[index, : len(words)] = row.slot, words
            left = [some[_MASKS:] for some in left]
            self._state = self._state._replace(sampler=self._compiled["masks"](self._state.sampler, slot_c, masks_cw))

    def _empty_masks(self) -> tuple[np.ndarray, np.ndarray]:
        count = self._num_replicas * _MASKS
        num_words = self._state.sampler.masks_rw.shape[1]
        return np.full(count, self._num_slots, np.int32), np.zeros((count, num_words), np.uint32)


def _cost_of(job: Any) -> int:
    """Longest compilations first, so that two workers end together."""
    return job.tokens if isinstance(job, Rung) else 0


def _history_chunk(
    slot: int,
    is_first: bool,
    floor: float,
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    pairs: tuple[tuple[int, float], ...],
    vocab_size: int,
) -> tuple[Any, ...]:
    def padded(values: Any, default: float, dtype: type) -> np.ndarray:
        array = np.full(_HISTORY, default, dtype)
        array[: len(values)] = values
        return array

    return (
        np.int32(slot),
        np.bool_(is_first),
        np.float32(floor),
        padded(prompt, vocab_size, np.int32),
        padded(answer, vocab_size, np.int32),
        padded([token for token, _ in pairs], vocab_size, np.int32),
        padded([amount for _, amount in pairs], 0.0, np.float32),
    )


def _fetch(logprobs: Logprobs) -> Logprobs:
    return jax.tree.map(np.asarray, logprobs)


def _logprob(logprobs: Logprobs | None, index: int, token_id: int, count: int) -> TokenLogprob:
    assert logprobs is not None
    return TokenLogprob(
        token_id=token_id,
        logprob=float(logprobs.token[index]),
        rank=int(logprobs.rank[index]),
        top_ids=tuple(logprobs.top_ids[index, :count].tolist()),
        top_logprobs=tuple(logprobs.top[index, :count].tolist()),
    )


def _prompt_scores(row: Row, prompt: Logprobs | None, position: int) -> tuple[TokenLogprob | None, ...]:
    """Scores of one row's targets; the wanted ones lie from `position` on."""
    scores: list[TokenLogprob | None] = []
    for target in row.logprob_targets or ():
        if target < 0:
            scores.append(None)
            continue
        scores.append(_logprob(prompt, position, target, row.params.prompt_logprobs or 0))
        position += 1
    return tuple(scores)
