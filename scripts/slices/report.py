"""The report's lines: one for each case and kind of step, compiled in a process of its own."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from typing import Any

from slices.cases import CASES, Case

ROWS, TOKENS, TABLE = 64, 1024, 128  # rows of a step, tokens of a mixed one, blocks of a row
UTILIZATION = 0.9  # of HBM, the engine's default
RUNGS = ("decode", "mixed")

ABOUT = f"""\
The engine's whole jitted step (all layers, sampling, scores of prompts) in bfloat16, {ROWS} rows: `decode` with one token each,
`mixed` with {TOKENS:,} tokens; contexts of up to {TABLE * 32:,} tokens. The KV pool takes what weights and step leave of
{UTILIZATION:.0%} of HBM, as in the engine. Compiled by the TPU compiler on a machine without TPUs; **nothing here has run on a
chip**. All bytes are those of one device.

Names of slices: v5e-4, v6e-8 count chips; v5p-8 counts cores, so it has 4 chips, and v5p-32 has 16. A v5p chip is one device.

| column | |
|---|---|
| weights, pool GB | planned before anything is compiled |
| step MB: plan, compiler | all else that a step holds: sampler state and temporaries |
| HBM GB, of | what the compiler says that the program needs, and what the device has |
| per layer | collectives of a layer (all are alike, but for the last one of a mixed step, which has a branch for prompts \
that are scored and one for those that are not) |
| layer KB | the results of these collectives, and in brackets what a device sends for them: of an all-reduce over n devices \
2 (n - 1) / n of its size |
| step MB | what a device sends in a whole step. Every branch counts as taken, every loop as one turn |
| other | collectives outside of layers: the sum of embeddings, and what sampling and scores take; the largest in KB |
| gathers KB | the largest array that is handed on as it is (all-gather, all-to-all, collective-permute) |
| async | collectives that have a start and a done, with work in between |
| compile s | on 2 cores, others busy beside |
"""


def case_of(slice_name: str, model: str) -> Case:
    return next(case for case in CASES if (case.slice, case.model) == (slice_name, model))


def compile_one(slice_name: str, model: str, rung_name: str) -> None:
    """Print what the table needs as JSON."""
    import jax.numpy as jnp
    from slices import step, traffic

    from jaxserve.executor.ladder import Rung
    from jaxserve.models.config import dense_from_hf
    from jaxserve.pallas_kernels.ahead_of_time import compile_on, hbm_bytes, slice_devices
    from jaxserve.sharding.hlo import collectives, totals
    from jaxserve.sharding.mesh import make_mesh

    case, dtype = case_of(slice_name, model), jnp.dtype("bfloat16")
    rungs = {"decode": Rung(ROWS, ROWS, True), "mixed": Rung(TOKENS, ROWS, False)}
    mesh = make_mesh(case.parallel, slice_devices(case.topology))
    cfg = step.laid_out(dense_from_hf(case.config), case.parallel)
    hbm = hbm_bytes(case.topology.split(":")[0])
    plan = step.plan(cfg, case.parallel, rungs["mixed"], dtype, int(hbm * UTILIZATION))
    made = step.make_step(cfg, case.parallel, mesh, rungs[rung_name], plan.num_blocks, dtype, TABLE)
    begin = time.perf_counter()
    program = compile_on(mesh, made.jitted, *made.args)
    compile_s = time.perf_counter() - begin
    memory, found = program.compiled.memory_analysis(), collectives(program.text)
    sampler = 8 * ROWS * (cfg.vocab_size + cfg.vocab_padding) // case.parallel.num_shards("vocab")
    parts = traffic.by_part(found)
    layers = [parts[f"layer{i}"] for i in range(cfg.num_layers)]
    regular = layers if rung_name == "decode" else layers[:-1]
    if any(totals(layer) != totals(layers[0]) for layer in regular):
        raise SystemExit(f"the layers are not alike: {[totals(layer) for layer in layers]}")
    others = [one for name, part in parts.items() if not name.startswith("layer") for one in part]
    unwanted = traffic.moved_arrays(found, step.smallest_matrix_bytes(cfg, case.parallel, dtype))
    facts = {
        "num_layers": cfg.num_layers,
        "plan": dataclasses.asdict(plan),
        "hbm": hbm,
        "sampler": sampler,
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "layer": {kind: count for kind, (count, _) in totals(layers[0]).items()},
        "layer_results": sum(one.count * one.result_bytes for one in layers[0]),
        "layer_sent": sum(sent for _, sent in totals(layers[0]).values()),
        "step": totals(found),
        "others": sum(one.count for one in others),
        "largest_other": max(one.result_bytes for one in others),
        "largest_moved": max((one.result_bytes for one in traffic.moved_arrays(found, 0)), default=0),
        "async": sum(one.is_async for one in found),
        "unwanted": [f"{one.kind} {one.name} of {one.result_bytes} bytes" for one in unwanted],
        "compile_s": compile_s,
        "kernels": program.text.count('custom_call_target="tpu_custom_call"'),
    }
    print(json.dumps(facts))


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
    if needs > facts["hbm"] * UTILIZATION:
        said.append(f"needs {needs / 1e9:.2f} GB, more than {UTILIZATION:.0%} of {facts['hbm'] / 1e9:.2f} GB")
    if facts["aliased"] < facts["plan"]["pool"]:
        said.append("copies the pool")
    if not facts["kernels"]:
        said.append("does not run our kernels")
    return said


def line_of(case: Case, rung: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The table's columns, from what `compile_one` said."""
    plan, kb = facts["plan"], lambda n: round(n / 1024, 1)
    kinds = ", ".join(f"{count} {kind}" for kind, count in facts["layer"].items())
    return {
        "slice": case.slice,
        "model": case.model,
        "layers": facts["num_layers"],
        "mesh": str(case.parallel),
        "step": rung,
        "weights GB": round(plan["weights"] / 1e9, 2),
        "pool GB": round(plan["pool"] / 1e9, 2),
        "step MB: plan": round(plan["step"] / 1e6),
        "compiler": round((facts["temp"] + facts["results"] + facts["sampler"]) / 1e6),
        "HBM GB": round((facts["arguments"] + facts["results"] + facts["temp"]) / 1e9, 2),
        "of": round(facts["hbm"] / 1e9, 2),
        "per layer": kinds,
        "layer KB": f"{kb(facts['layer_results'])} ({kb(facts['layer_sent'])})",
        "step MB": round(sum(sent for _, sent in facts["step"].values()) / 1e6, 2),
        "other": f"{facts['others']} ({kb(facts['largest_other'])})",
        "gathers KB": kb(facts["largest_moved"]),
        "async": facts["async"],
        "compile s": math.ceil(facts["compile_s"]),
    }
