"""What every worker speaks: one workload file in, one JSON line per answer out.

    python peers/NAME.py WORKLOAD.json [--prepare]

With `--prepare` it only converts the checkpoint for its engine; time and memory of that do not count. Otherwise it
loads the engine, runs a short warm-up and prints `{"ready": ...}`. Then each line on standard input is the name of a
row to measure once; the answer is `{"row": ..., "value": ..., "tokens": ...}`. End of input ends the worker.
The orchestrator keeps two workers alive and asks them in turn, so that both see the same state of the machine.

Standard library only: this file runs in the environment of every peer.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Prompts = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of an engine: greedy, end-of-sequence ignored, all prompts given at once."""

    first_s: float  # from the call to the first token of any prompt
    total_s: float  # from the call to the last token of all prompts
    tokens: Prompts  # generated ids, in the order of the prompts


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A loaded engine."""

    generate: Callable[[Prompts, int], Run]  # (prompts, new tokens per prompt)
    versions: dict[str, str]
    mode: dict[str, str] = field(default_factory=dict)  # how it was set up, for the record
    close: Callable[[], None] = lambda: None


def rate(kind: str, prompts: Prompts, run: Run) -> float:
    """The number that a row stands for, tokens/s; see `workload.make_row`."""
    if kind == "prefill":
        return len(prompts[0]) / run.first_s
    if kind == "decode":
        return (len(run.tokens[0]) - 1) / (run.total_s - run.first_s)
    return sum(map(len, run.tokens)) / run.total_s


def measure(engine: Engine, row: dict[str, Any]) -> dict[str, Any]:
    """Runs a row once; checks that the engine did all the work."""
    run = engine.generate(row["prompts"], row["new_tokens"])
    counts = {len(tokens) for tokens in run.tokens}
    if len(run.tokens) != len(row["prompts"]) or counts != {row["new_tokens"]}:
        raise RuntimeError(f"{row['name']}: {len(run.tokens)} outputs of {sorted(counts)} tokens")
    value = rate(row["kind"], row["prompts"], run)
    return {"row": row["name"], "value": value, "total_s": run.total_s, "tokens": run.tokens}


def warm_up(engine: Engine, rows: list[dict[str, Any]]) -> None:
    """Every shape once: single prompts as they are, batches with a few prompts and tokens."""
    for row in rows:
        engine.generate(row["prompts"][:4], min(row["new_tokens"], 4))


def serve(
    load: Callable[[dict[str, Any]], Engine], prepare: Callable[[dict[str, Any]], None] = lambda workload: None
) -> None:
    """Runs a worker until its standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines print to standard output; answers must stay alone there
    with open(sys.argv[1], encoding="utf-8") as file:
        workload = json.load(file)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: workload["threads"]])
    if sys.argv[2:] == ["--prepare"]:
        prepare(workload)
        return
    try:
        start = time.perf_counter()
        engine = load(workload)
        loaded = time.perf_counter()
        warm_up(engine, workload["rows"])
        ready = {"load_s": loaded - start, "warm_up_s": time.perf_counter() - loaded}
        print(json.dumps({"ready": ready, "versions": engine.versions, "mode": engine.mode}), file=answers)
        rows = {row["name"]: row for row in workload["rows"]}
        for line in sys.stdin:
            print(json.dumps(measure(engine, rows[line.strip()])), file=answers)
        engine.close()
    except Exception as error:  # noqa: BLE001  a process border: the orchestrator prints the reason in its table
        traceback.print_exc()
        print(json.dumps({"failed": f"{type(error).__name__}: {error}"[:300]}), file=answers)
        answers.flush()
        os._exit(1)  # some engines hang on exit after an error
