"""Judging block sizes by the schedule that the TPU compiler makes: an estimate of cycles, not a measurement.

A tile costs its bundles outside the core once, and for each chunk of its keys the core, or longer if memory is slower. The
copy of a chunk is asked for one chunk ahead, so that memory works while the core does; but a copy also takes a while to
begin. With `core` cycles, `hbm` cycles of copying and `LATENCY_S` before they begin, chunks follow each other every

    max(core, hbm, (core + hbm + latency) / 2)

The last chunk of a row copies only the pages that it has, but is computed whole.
"""

import json
from collections.abc import Mapping
from typing import Any

from kernels import tpu

from tuning.climb import Judge, Judged, RefusedError

CALLS = tuple(tpu.CALLS)
LATENCY_S = 1e-6  # assumed: from asking for a copy to its first bytes; no chip was there to measure it
LENGTHS = {"decode": (500, 2000, 8000), "prefill": (120, 1000, 4000)}  # tokens of a row


def judge(script: str, chip: str, model: str, call: str) -> Judge:
    """Of the kernels of a call; `script` compiles when started with `--one CHIP MODEL CALL CHOICES`."""

    def cost(choices: Mapping[str, Any]) -> Judged:
        try:
            with tpu.compiled([script, "--one", chip, model, call, json.dumps(dict(choices))]) as (folder, said):
                lines = [tpu.line(folder, chip, model, kernel, said[0]) for kernel in tpu.CALLS[call].kernels]
        except tpu.CompilerError as error:
            raise RefusedError(str(error)) from None
        answers = {(where, question): _tuple(answer) for where, question, answer in said[1]["asked"]}
        tile = next((answer for (_, question), answer in answers.items() if question == "query_tile()"), 1)
        tile = min(tile, tpu.CALLS[call].num_tokens)  # as in the call that was compiled
        latency = LATENCY_S * said[0]["clock_hz"]
        costs = {}
        for line in lines:
            for length in LENGTHS.get(line["kernel"], ()):
                costs[f"{line['kernel']} {length}"] = _cycles(line, length, tile, latency)
        return Judged(costs, answers)

    return Judge(cost, "schedule", model, tpu.versions())


def _cycles(line: dict[str, Any], length: int, tile: int, latency: float) -> float:
    """Of one row: the last of a sequence's tokens for a decode, all of them for a prefill."""
    ends = [length] if line["kernel"] == "decode" else [*range(tile, length, tile), length]
    total = 0.0
    for end in ends:
        total += line["bundles"] - line["core"]
        for begin in range(0, end, line["keys"]):
            hbm = line["HBM"] * min(end - begin, line["keys"]) / line["keys"]
            total += max(line["core"], hbm, (line["core"] + hbm + latency) / 2)
    return total


def compile_one(chip: str, model: str, call: str, choices: dict[str, Any]) -> None:
    """In a process of its own: print what `tpu.line` needs, and then what the rules were asked."""
    from jaxserve.pallas_kernels.ragged_paged_attention import tuned

    with tuned.table.trying(choices):
        tpu.compile_one(chip, model, call)
    asked = [(where, question, one.choice) for (where, question), one in tuned.table.asked.items()]
    print(json.dumps({"asked": asked}))


def _tuple(answer: Any) -> Any:
    return tuple(answer) if isinstance(answer, list) else answer
