"""A run as a Chrome trace: chrome://tracing and https://ui.perfetto.dev open it. A process for each replica; in it the
device's steps, and each slot's calls, waiting apart."""

import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxserve.sim.record import Record
from jaxserve.sim.replica import Replica
from jaxserve.sim.run import Run

MOST_STEPS = 200_000  # of a replica; viewers become slow
_US = 1e6


def save_chrome_trace(run: Run, path: Path, title: str = "") -> int:
    """Write a run; returns how many steps were left out at the end because there are too many."""
    left_out = 0
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        separator = ""
        for replica in run.replicas:
            left_out += max(len(replica.executor.steps) - MOST_STEPS, 0)
            for event in _events(run, replica, title):
                file.write(separator + json.dumps(event))
                separator = ",\n"
        file.write("\n]}\n")
    return left_out


def _events(run: Run, replica: Replica, title: str) -> Iterator[dict[str, Any]]:
    pid, steps = replica.index, replica.executor.steps
    name = f"replica {replica.index} {replica.spec.engine_type} {title}".rstrip()
    yield {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": name}}
    yield {"ph": "M", "pid": pid, "tid": 0, "name": "thread_name", "args": {"name": "device"}}
    last_s = 0.0
    columns = steps.start_s, steps.end_s, steps.num_rows, steps.num_tokens, steps.num_decodes, steps.num_padded
    for start_s, last_s, rows, tokens, decodes, padded in zip(
        *(column[:MOST_STEPS] for column in columns), strict=True
    ):
        prompt = tokens - decodes
        what = (
            f"{decodes} decodes" if not prompt else f"prompts {prompt}" + (f" + {decodes} decodes" if decodes else "")
        )
        yield _span(pid, 0, what, start_s, last_s, {"rows": rows, "tokens": tokens, "padding": padded})
    records = [r for r in run.records if r.replica == replica.index and r.start_s is not None]
    lanes = 0
    for lane, record in _in_lanes([record for record in records if record.arrival_s <= last_s]):
        if lane == lanes:
            lanes += 1
            label = {"name": f"calls {lane + 1}"}
            yield {"ph": "M", "pid": pid, "tid": lane + 1, "name": "thread_name", "args": label}
        yield from _call(pid, lane + 1, record, run.end_s)


def _in_lanes(records: list[Record]) -> Iterator[tuple[int, Record]]:
    """Calls in as few lanes as hold them without overlap."""
    busy: list[tuple[float, int]] = []  # heap: (until when, lane)
    free: list[int] = []
    for record in sorted(records, key=lambda record: record.arrival_s):
        while busy and busy[0][0] <= record.arrival_s:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (float("inf") if record.finish_s is None else record.finish_s, lane))
        yield lane, record


def _call(pid: int, tid: int, record: Record, end_s: float) -> Iterator[dict[str, Any]]:
    call, start_s = record.call, record.start_s or 0.0
    first_s = end_s if record.first_s is None else record.first_s
    finish_s = end_s if record.finish_s is None else record.finish_s
    facts = {
        "call": call.call_id,
        "client": call.client,
        "program": call.program,
        "stage": call.stage,
        "prompt": record.num_prompt,
        "cached": record.num_cached,
        "answer": record.num_output,
        "preemptions": record.num_preemptions,
    }
    yield _span(
        pid, tid, call.call_id, record.arrival_s, finish_s, {key: value for key, value in facts.items() if value}
    )
    yield _span(pid, tid, "waits", record.arrival_s, start_s, {})
    yield _span(pid, tid, "prompt", start_s, first_s, {})
    yield _span(pid, tid, "answer", first_s, finish_s, {})


def _span(pid: int, tid: int, name: str, start_s: float, end_s: float, facts: dict[str, Any]) -> dict[str, Any]:
    span = {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "name": name,
        "ts": start_s * _US,
        "dur": max(end_s - start_s, 0.0) * _US,
    }
    return span | ({"args": facts} if facts else {})
