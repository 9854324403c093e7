"""A run in numbers: one dictionary that JSON can hold. Times are seconds."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxserve.sim.record import Record
from jaxserve.sim.run import Run
from jaxserve.workload.call import critical_tokens

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Slo:
    """What a call has to keep to count. None: no limit."""

    ttft_s: float | None = None  # from arrival to the first token
    tpot_s: float | None = None  # mean time of a token after the first
    tbt_s: float | None = None  # longest time between two tokens

    def holds(self, record: Record) -> bool:
        """Whether a call has ended and kept all limits."""
        if record.finish_s is None or record.first_s is None:
            return False
        reached = (record.first_s - record.arrival_s, _tpot_s(record) or 0.0, record.worst_s)
        return all(
            limit is None or value <= limit for value, limit in zip(reached, dataclasses.astuple(self), strict=True)
        )


def report(run: Run, slo: Slo | None = None) -> dict[str, Any]:
    """All figures of a run.

    `ttft`, `tpot`, `latency` and `wait` (for the first step) are of calls, `tbt` (between two tokens of an answer) of
    tokens, `program` of programs: from the first arrival to the last answer, and that over the answer tokens of the
    longest way. A prompt token is cached if it did not have to be fed when its call first ran.
    """
    ended = [record for record in run.records if record.finish_s is not None and record.first_s is not None]
    refused = [record for record in run.records if record.refused]
    steps = [replica.executor.steps for replica in run.replicas]
    counters = [replica.scheduler.counters for replica in run.replicas]
    begun = [record for record in run.records if record.start_s is not None]
    prompts, cached = sum(record.num_prompt for record in begun), sum(record.num_cached for record in begun)
    tokens, padded = sum(sum(s.num_tokens) for s in steps), sum(sum(s.num_padded) for s in steps)
    num_output = sum(record.num_output for record in run.records)
    end_s = run.end_s or 1.0
    facts: dict[str, Any] = {
        "workload": run.workload.name,
        "is_partial": run.is_partial,
        "calls": len(run.workload.calls),
        "calls_arrived": len(run.records),
        "calls_ended": len(ended),
        "calls_refused": len(refused),
        "first_refusal": f"call {refused[0].call.call_id}: {refused[0].refused}" if refused else "",
        "end_s": run.end_s,
        "steps": sum(map(len, steps)),
        "prompt_tokens": sum(record.num_prompt for record in run.records),
        "output_tokens": num_output,
        "requests_per_s": len(ended) / end_s,
        "output_tokens_per_s": num_output / end_s,
        "tokens_per_s": (tokens + cached) / end_s,
        "ttft_s": spread(r.first_s - r.arrival_s for r in ended if r.first_s is not None),
        "tpot_s": spread(value for r in ended if (value := _tpot_s(r)) is not None),
        "tbt_s": _weighted(run.gaps.seconds, run.gaps.counts),
        "latency_s": spread(r.finish_s - r.arrival_s for r in ended if r.finish_s is not None),
        "wait_s": spread(r.start_s - r.arrival_s for r in ended if r.start_s is not None),
        "cached_share": cached / prompts if prompts else 0.0,
        "preemptions": sum(c.preemptions for c in counters),
        "wasted_rows": sum(c.wasted_rows for c in counters),
        "swapped_bytes": sum(s.swapped_bytes for s in steps),
        "compile_stall_s": sum(s.stall_s for s in steps),
        "padding_share": padded / (tokens + padded) if tokens else 0.0,
        "utilisation": [s.busy_s / end_s for s in steps],
        "rows_per_step": sum(sum(s.num_rows) for s in steps) / max(sum(map(len, steps)), 1),
        "calls_per_replica": [sum(r.replica == replica.index for r in run.records) for replica in run.replicas],
        "schedule_digest": hashlib.blake2b(b"".join(s.digest.digest() for s in steps), digest_size=16).hexdigest(),
    }
    facts |= _programs(run.records) | _deadlines(run)
    if slo is not None:
        kept = sum(map(slo.holds, run.records))
        facts["slo"] = dataclasses.asdict(slo) | {
            "share": kept / max(len(run.records), 1),
            "goodput_per_s": kept / end_s,
        }
    if run.fairness is not None:
        facts["fairness"] = {
            "worst_gap": run.fairness.worst_gap,
            "jain": run.fairness.jain(),
            "service": run.fairness.service,
            "clients": _clients(ended),
        }
    return facts


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean, percentiles and maximum; empty where there are no values."""
    array = np.fromiter(values, float)
    if not array.size:
        return {}
    levels = np.percentile(array, PERCENTILES)
    named = {f"p{level}": float(value) for level, value in zip(PERCENTILES, levels, strict=True)}
    return {"mean": float(array.mean())} | named | {"max": float(array.max())}


def _weighted(values: Sequence[float], counts: Sequence[int]) -> dict[str, float]:
    """The same of values that occur several times: the smallest that so many percent do not exceed."""
    array, weights = np.asarray(values, float), np.asarray(counts, float)
    if not array.size:
        return {}
    order = np.argsort(array, kind="stable")
    below = np.cumsum(weights[order])
    named = {f"p{level}": float(array[order][np.searchsorted(below, below[-1] * level / 100)]) for level in PERCENTILES}
    return {"mean": float((array * weights).sum() / below[-1])} | named | {"max": float(array.max())}


def _tpot_s(record: Record) -> float | None:
    if record.first_s is None or record.num_output < 2:
        return None
    return (record.last_s - record.first_s) / (record.num_output - 1)


def _programs(records: Sequence[Record]) -> dict[str, Any]:
    """Latency of programs all of whose calls that arrived have ended, and how many have not."""
    programs = dict[str, list[Record]]()
    for record in records:
        if record.call.program:
            programs.setdefault(record.call.program, []).append(record)
    if not programs:
        return {}
    whole = [calls for calls in programs.values() if all(record.finish_s is not None for record in calls)]
    latencies, per_token = list[float](), list[float]()
    for calls in whole:
        latency_s = max(r.finish_s or 0.0 for r in calls) - min(r.arrival_s for r in calls)
        written = {record.call.call_id: record.num_output for record in calls}
        tokens = critical_tokens([record.call for record in calls], written)
        latencies.append(latency_s)
        per_token.append(latency_s / max(tokens, 1))
    return {
        "programs": len(programs),
        "programs_ended": len(whole),
        "program_latency_s": spread(latencies),
        "program_s_per_token": spread(per_token),
    }


def _deadlines(run: Run) -> dict[str, Any]:
    """Which programs (or calls without one) with a deadline were answered in time."""
    last, first, limits = dict[str, float](), dict[str, float](), dict[str, float]()
    for record in run.records:
        call = record.call
        name = call.root
        first[name] = min(first.get(name, record.arrival_s), record.arrival_s)
        last[name] = max(last.get(name, 0.0), float("inf") if record.finish_s is None else record.finish_s)
        if call.deadline_s is not None:
            limits[name] = min(limits.get(name, call.deadline_s), call.deadline_s)
    if not limits:
        return {}
    kept = sum(last[name] - first[name] <= limit for name, limit in limits.items())
    return {"deadlines": {"count": len(limits), "share": kept / len(limits)}}


def _clients(ended: Iterable[Record]) -> Mapping[str, Any]:
    calls = dict[str, list[Record]]()
    for record in ended:
        calls.setdefault(record.call.client, []).append(record)
    return {
        client: {
            "calls_ended": len(records),
            "output_tokens": sum(r.num_output for r in records),
            "ttft_s": spread(r.first_s - r.arrival_s for r in records if r.first_s is not None),
            "latency_s": spread(r.finish_s - r.arrival_s for r in records if r.finish_s is not None),
        }
        for client, records in sorted(calls.items())
    }
