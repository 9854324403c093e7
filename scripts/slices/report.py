"""The report's lines: one for each case and kind of step, compiled in a process of its own."""

import json
import math
import os
import subprocess
import sys
import time
from typing import Any

from jaxserve.config import EngineConfig
from slices.cases import CASES, Case

ROWS, TOKENS, LENGTH = 64, 1024, 8192  # rows of a step, tokens of a mixed one, and the longest context
UTILIZATION = 0.9  # of HBM, the engine's default
RUNGS = ("decode", "mixed")
CONFIG = EngineConfig(
    max_num_seqs=ROWS, max_num_batched_tokens=TOKENS, max_model_len=LENGTH, memory_utilization=UTILIZATION
)

ABOUT = f"""\
The engine's whole jitted step (all layers, sampling, scores of prompts) in bfloat16, {ROWS} rows: `decode` with one token
each, `mixed` with {TOKENS:,} tokens; contexts of up to {LENGTH:,} tokens. The KV pool takes what weights and step leave
of {UTILIZATION:.0%} of HBM, as in the engine, but no more than {ROWS} rows can fill. Compiled by the TPU compiler on a
machine without TPUs; **nothing here has run on a chip**. All bytes are those of one device.

Names of slices: v5e-4 and v6e-8 count chips; v5p-8 counts cores, so it has 4 chips, and v5p-32 has 16. A v5p chip is one
device. `like-deepseek-v3` is four layers of its width, heads and experts, not the model: grouped-query attention (8 KV
heads) stands in for its latent attention, softmax for its routing by sigmoid.

| column | |
|---|---|
| weights, pool GB | planned before anything is compiled |
| step MB | what a step holds besides its arguments (logits, activations, results): planned for the larger step, and by the \
compiler for this one |
| HBM GB | all of it (weights, pool, sampler state, inputs, step), planned and by the compiler; usable: all that a program \
may have |
| per layer | collectives of a layer. All layers are alike, but for the last one of a mixed step, which \
has a branch for all tokens and one for the last of each row |
| layer KB | the results of these collectives, and in brackets what a device sends for them: of an all-reduce over n \
devices 2 (n - 1) / n of its size |
| sent MB | what a device sends in a whole step, if every branch were taken and every loop had one turn |
| other | collectives outside of layers: the sum of embeddings, and what sampling and scores take; the largest in KB |
| gathers KB | the largest array that is handed on as it is (all-gather, all-to-all, collective-permute) |
| async | collectives that have a start and a done, with work in between |
| compile s | on 2 cores that many others used beside: more than twice what it takes alone |
"""


def case_of(slice_name: str, model: str) -> Case:
    return next(case for case in CASES if (case.slice, case.model) == (slice_name, model))


def compile_one(slice_name: str, model: str, rung_name: str) -> None:
    """Print what the table needs as JSON."""
    from jaxserve.executor.ladder import Rung
    from jaxserve.memory.plan import lay_out
    from jaxserve.memory.room import of_chip
    from jaxserve.models.config import from_hf
    from jaxserve.pallas_kernels.ahead_of_time import compile_on, slice_devices
    from jaxserve.sharding.mesh import make_mesh
    from slices import step

    case = case_of(slice_name, model)
    devices, parallel = slice_devices(case.topology), case.parallel
    plan = lay_out(CONFIG, from_hf(case.config), of_chip(case.topology.split(":")[0], len(devices)), parallel)
    if plan.problem:
        raise SystemExit(plan.problem)
    rung = {"decode": Rung(ROWS, ROWS, True), "mixed": Rung(TOKENS, ROWS, False)}[rung_name]
    mesh, table = make_mesh(parallel, devices), LENGTH // plan.block_size
    made = step.make_step(plan.cfg, parallel, mesh, rung, plan.num_blocks, plan.dtype, table)
    begin = time.perf_counter()
    program = compile_on(mesh, made.jitted, *made.args)
    compile_s = time.perf_counter() - begin
    memory = program.compiled.memory_analysis()
    planned = {
        "weights": plan.needs.weights,
        "pool": plan.pool_bytes,
        "sampler": plan.needs.sampler,
        "activations": plan.needs.activations,
        "hbm": plan.room.device_bytes,
    }
    compiled = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "kernels": program.text.count('custom_call_target="tpu_custom_call"'),
        "compile_s": compile_s,
    }
    smallest = step.smallest_matrix_bytes(plan.specs, parallel, plan.dtype)
    print(json.dumps(planned | compiled | _traffic(program.text, plan.cfg.num_layers, rung_name, smallest)))


def _traffic(text: str, num_layers: int, rung_name: str, smallest: int) -> dict[str, Any]:
    """What devices tell each other. `smallest`: bytes of a weight, which nothing that is handed on may have."""
    from jaxserve.sharding.hlo import collectives, totals
    from slices import traffic

    found = collectives(text)
    parts = traffic.by_part(found)
    layers = [parts[f"layer{i}"] for i in range(num_layers)]
    if any(totals(layer) != totals(layers[0]) for layer in (layers if rung_name == "decode" else layers[:-1])):
        raise SystemExit(f"the layers are not alike: {[totals(layer) for layer in layers]}")
    others = [one for name, part in parts.items() if not name.startswith("layer") for one in part]
    moved = traffic.moved_arrays(found, 0)
    return {
        "num_layers": num_layers,
        "layer": {kind: count for kind, (count, _) in totals(layers[0]).items()},
        "layer_results": sum(one.count * one.result_bytes for one in layers[0]),
        "layer_sent": sum(sent for _, sent in totals(layers[0]).values()),
        "step": totals(found),
        "others": sum(one.count for one in others),
        "largest_other": max(one.result_bytes for one in others),
        "largest_moved": max((one.result_bytes for one in moved), default=0),
        "async": sum(one.is_async for one in found),
        "unwanted": [
            f"{one.kind} {one.name} of {one.result_bytes} bytes" for one in moved if one.result_bytes >= smallest
        ],
    }


def versions() -> dict[str, str]:
    """Of what has made the lines."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from jaxserve.pallas_kernels.ahead_of_time import compiler_version

    return {"jax": jax.__version__, "libtpu": compiler_version()}


def line(script: str, case: Case, rung: str) -> dict[str, Any]:
    """Of one step; `script` compiles it when started with `--one SLICE MODEL RUNG`.

    Raises: SystemExit if it does not compile, does not fit, copies the pool, or moves an array of a weight's size.
    """
    done = subprocess.run(
        [sys.executable, script, "--one", case.slice, case.model, rung],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    what = f"{case.slice} {case.model} {rung}"
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr.strip().splitlines()[-1]}")
    facts = json.loads(done.stdout.splitlines()[-1])
    for complaint in complaints(facts):
        raise SystemExit(f"{what}: {complaint}")
    return line_of(case, rung, facts)


def complaints(facts: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled step."""
    needs = facts["arguments"] + facts["results"] + facts["temp"]
    said = [f"moves an array of a weight's size: {text}" for text in facts["unwanted"]]
    if needs > facts["hbm"]:
        said.append(f"needs {needs / 1e9:.2f} GB of {facts['hbm'] / 1e9:.2f} GB")
    if facts["aliased"] < facts["pool"]:
        said.append("copies the pool")
    if not facts["kernels"]:
        said.append("does not run our kernels")
    return said


def line_of(case: Case, rung: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The table's columns, from what `compile_one` said."""

    def kb(num_bytes: int) -> float:
        return round(num_bytes / 1024, 1)

    kinds = ", ".join(f"{count} {kind}" for kind, count in facts["layer"].items())
    return {
        "slice": case.slice,
        "model": case.model,
        "layers": facts["num_layers"],
        "mesh": str(case.parallel),
        "step": rung,
        "weights GB": round(facts["weights"] / 1e9, 2),
        "pool GB": round(facts["pool"] / 1e9, 2),
        "step MB planned": round(facts["activations"] / 1e6),
        "step MB": round((facts["temp"] + facts["results"]) / 1e6),
        "HBM GB planned": round((facts["weights"] + facts["pool"] + facts["sampler"] + facts["activations"]) / 1e9, 2),
        "HBM GB": round((facts["arguments"] + facts["results"] + facts["temp"]) / 1e9, 2),
        "usable GB": round(facts["hbm"] / 1e9, 2),
        "per layer": kinds,
        "layer KB": f"{kb(facts['layer_results'])} ({kb(facts['layer_sent'])})",
        "sent MB": round(sum(sent for _, sent in facts["step"].values()) / 1e6, 2),
        "other": f"{facts['others']} ({kb(facts['largest_other'])})",
        "gathers KB": kb(facts["largest_moved"]),
        "async": facts["async"],
        "compile s": math.ceil(facts["compile_s"]),
    }
