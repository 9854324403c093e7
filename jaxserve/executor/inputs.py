"""StepPlan -> arrays of one rung. Fresh NumPy arrays every time: XLA on CPU may alias them instead of copying."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
from flax import struct

from jaxserve.executor.ladder import Rung
from jaxserve.models.batch import TokenBatch
from jaxserve.request import MAX_BANNED
from jaxserve.sampling.sampler import Asks, SamplingInputs
from jaxserve.step import Row, StepPlan

T = TypeVar("T")  # what the tree holds: arrays of NumPy or JAX


@struct.dataclass
class StepInputs(Generic[T]):
    """Everything a step takes besides weights and state."""

    batch: TokenBatch[T]
    feed_t: T  # i32[t]; slot whose last sampled token is fed here; past the last slot: `ids_t` holds it
    sampling: SamplingInputs[T]
    wanted_t: T  # i32[t]; tokens whose next prompt token is scored, the first `num_wanted` entries
    target_t: T  # i32[t]
    num_wanted: T  # i32[]


class Place(NamedTuple):
    """Where the results of a row lie."""

    row: int  # in arrays with an entry for each row
    score: int  # of its first wanted prompt token, in arrays with an entry for each token


def make_inputs(
    plan: StepPlan, rung: Rung, *, table_width: int, num_slots: int, vocab_size: int, num_replicas: int = 1
) -> StepInputs[Any]:
    """Lay each replica's rows out one after the other and pad to the rung.

    The parts of the replicas follow each other along every array's first axis, which is `num_replicas` times as long as
    the rung says; what is counted inside of a part (tokens, slots, blocks) starts at 0 in each. `num_wanted` is the most
    of any replica, `asks` what any row of any replica asks for: all replicas take the same branches.
    """
    sizes = {"table_width": table_width, "num_slots": num_slots, "vocab_size": vocab_size}
    parts = [_part(rows, rung, **sizes) for rows in _rows_by_replica(plan, num_replicas)]
    return parts[0] if num_replicas == 1 else jax.tree.map(_join, *parts)


def empty_inputs(
    rung: Rung, *, table_width: int, num_slots: int, vocab_size: int, num_replicas: int = 1
) -> StepInputs[Any]:
    """Inputs of a rung without any row, for compiling it."""
    sizes = {"table_width": table_width, "num_slots": num_slots, "vocab_size": vocab_size}
    return make_inputs(StepPlan(index=0, rows=()), rung, **sizes, num_replicas=num_replicas)


def places(plan: StepPlan, rung: Rung) -> list[Place]:
    """For each row, in plan order, where the arrays of `make_inputs`, and what a step makes of them, have it."""
    used: dict[int, Place] = {}
    found = []
    for row in plan.rows:
        place = used.get(row.replica, Place(row.replica * rung.rows, row.replica * rung.tokens))
        num_wanted = sum(target >= 0 for target in row.logprob_targets or ())
        used[row.replica] = Place(place.row + 1, place.score + num_wanted)
        found.append(place)
    return found


def _rows_by_replica(plan: StepPlan, num_replicas: int) -> list[list[Row]]:
    parts = [[] for _ in range(num_replicas)]
    for row in plan.rows:
        parts[row.replica].append(row)
    return parts


def _join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts) if parts[0].ndim else np.max(parts)


def _part(rows: list[Row], rung: Rung, *, table_width: int, num_slots: int, vocab_size: int) -> StepInputs[Any]:
    """One replica's part."""
    counts = [row.num_tokens for row in rows]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    ids_t = np.zeros(rung.tokens, np.int32)
    feed_t = np.full(rung.tokens, num_slots, np.int32)
    kv_len_s = np.zeros(rung.rows, np.int32)
    table_sm = np.zeros((rung.rows, table_width), np.int32)
    wanted_t, target_t, num_wanted = np.zeros(rung.tokens, np.int32), np.zeros(rung.tokens, np.int32), 0
    for index, row in enumerate(rows):
        begin, count = starts[index], counts[index]
        ids_t[begin : begin + len(row.token_ids)] = row.token_ids
        if row.feeds_last:
            feed_t[begin + count - 1] = row.slot
        kv_len_s[index] = row.start + count
        table_sm[index, : len(row.blocks)] = row.blocks
        for offset, target in enumerate(row.logprob_targets or ()):
            if target >= 0:
                wanted_t[num_wanted], target_t[num_wanted] = begin + offset, target
                num_wanted += 1
    q_start_s = np.full(rung.rows + 1, starts[-1], np.int32)
    q_start_s[: len(starts)] = starts
    return StepInputs(
        batch=TokenBatch(
            ids_t=ids_t,
            q_start_s=q_start_s,
            kv_len_s=kv_len_s,
            table_sm=table_sm,
            max_q_len=1 if rung.decode_only else None,
            scheme=rung.scheme,
        ),
        feed_t=feed_t,
        sampling=_sampling(rows, rung.rows, num_slots, vocab_size),
        wanted_t=wanted_t,
        target_t=target_t,
        num_wanted=np.int32(num_wanted),
    )


def _sampling(rows: list[Row], size: int, num_slots: int, vocab_size: int) -> SamplingInputs[Any]:
    def column(default: float, dtype: type, value: Callable[[Row], float]) -> np.ndarray:
        array = np.full(size, default, dtype)
        array[: len(rows)] = [value(row) for row in rows]
        return array

    banned_sb = np.full((size, MAX_BANNED), vocab_size, np.int32)
    for index, row in enumerate(rows):
        banned_sb[index, : len(row.banned)] = row.banned
    temperature_s = column(0, np.float32, lambda r: r.params.temperature if r.samples else 0)
    top_k_s = column(0, np.int32, lambda r: min(max(r.params.top_k, 0), vocab_size))
    top_p_s = column(1, np.float32, lambda r: r.params.top_p)
    min_p_s = column(0, np.float32, lambda r: r.params.min_p)
    is_edited_s = column(False, np.bool_, lambda r: r.samples and r.params.has_edits)
    is_masked_s = column(False, np.bool_, lambda r: r.mask is not None)
    asks = Asks(
        edits=is_edited_s.any(),
        bans=(banned_sb < vocab_size).any(),
        masks=is_masked_s.any(),
        draws=(temperature_s > 0).any(),
        top_k=(top_k_s > 0).any(),
        top_p=(top_p_s < 1).any(),
        min_p=(min_p_s > 0).any(),
        logprobs=np.bool_(any(r.samples and r.params.logprobs is not None for r in rows)),
    )
    return SamplingInputs(
        slot_s=column(num_slots, np.int32, lambda r: r.slot if r.samples else num_slots),
        temperature_s=temperature_s,
        top_k_s=top_k_s,
        top_p_s=top_p_s,
        min_p_s=min_p_s,
        presence_s=column(0, np.float32, lambda r: r.params.presence_penalty),
        frequency_s=column(0, np.float32, lambda r: r.params.frequency_penalty),
        repetition_s=column(1, np.float32, lambda r: r.params.repetition_penalty),
        seed_s=column(0, np.uint32, lambda r: r.seat.seed),
        index_s=column(0, np.int32, lambda r: r.output_index),
        is_edited_s=is_edited_s,
        banned_sb=banned_sb,
        is_masked_s=is_masked_s,
        asks=asks,
    )
