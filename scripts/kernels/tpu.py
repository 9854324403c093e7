"""What the TPU compiler makes of attention, without a TPU: a line for each kernel of a call.

The compiler writes, for every bundle of instructions (one per cycle), how many of each unit's slots it uses. The *core* of
a kernel is what lies between the first and the last bundle that uses the matrix unit: for attention, one chunk of keys
of all heads of a grid step. A kernel without products is all core: one grid step. Bundles are a lower bound of cycles.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernels.schedule import memory, parse


@dataclasses.dataclass(frozen=True)
class Call:
    """A call to compile, and the kernels to look at in it."""

    num_tokens: int
    num_rows: int
    kernels: tuple[str, ...]


CALLS = {"decode": Call(64, 64, ("decode", "write_pages")), "mixed": Call(1024, 64, ("prefill",))}
KERNELS = tuple(kernel for call in CALLS.values() for kernel in call.kernels)
CHIPS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
MODELS = ("llama-3-8b", "llama-3-70b", "llama-3-70b-tp8", "qwen3-4b", "llama-3.2-1b", "gemma-2", "gpt-oss")

ABOUT = """\
One line per chip, model shape and kernel, in bfloat16 with pages of 32 tokens. `decode` and `write_pages` are those of a
call of 64 rows with one token each, `prefill` that of a call of 1,024 tokens. Nothing here was measured on a chip.

The compiler writes, for every bundle of instructions (one per cycle), how many of each unit's slots it uses. The *core*
of a kernel lies between the first and the last bundle that uses the matrix unit: for attention, one chunk of keys of
all heads of a grid step. `write_pages` has no product: all of it is shown, with the loops over its memory tiles once.

| column | |
|---|---|
| keys | keys of a chunk; slots that one step of `write_pages` reads and writes |
| core | bundles of the core, a lower bound of its cycles |
| HBM | cycles that the chip's memory needs for what the core reads (and writes) |
| MXU | cycles that the chip's matrix units need for its products at full rate |
| bound / core | the larger of the two (the roofline) over `core`. Below 1, the part of it that the schedule \
reaches; above, the limit is HBM, by that factor |
| MXU bundles | share of the core's bundles that use the matrix units |
| matmul, push, XLU, VALU, load, store | share of a unit's slots that are used: products, loading of their stationary \
factor, moves and sums across lanes, vector arithmetic, vector loads and stores |
| spills, fills | vector registers stored because there are too few, and loaded again, in the core |
| HBM KB | what the core reads (and writes) |
| VMEM KB, SMEM KB | what the program allocates on the chip: buffers, blocks of arguments, room for spills |
| bundles | of the whole kernel |
| compile s | of the whole call, on the machine that made the table |
| temp MB | HBM that the whole call needs besides arguments and results |
"""


def compile_one(chip: str, model: str, name: str) -> None:
    """In a process of its own, because the compiler reads its options once: print what the table needs as JSON."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas import tpu as pltpu

    from jaxserve.pallas_kernels.ahead_of_time import compile_for
    from jaxserve.pallas_kernels.ragged_paged_attention import cases, tpu, tpu_write
    from jaxserve.pallas_kernels.ragged_paged_attention.op import ragged_paged_attention
    from jaxserve.pallas_kernels.ragged_paged_attention.signature import Options, Rows

    call = CALLS[name]
    arrays, options = cases.shapes_of(cases.MODELS[model], num_tokens=call.num_tokens, num_rows=call.num_rows)
    pool = arrays.pop("pages_pkbd")
    facts: dict[str, Any] = {}
    clock_hz = 0.0

    def attend(pool, rest):
        nonlocal clock_hz
        info = pltpu.get_tpu_info()
        flops_per_cycle = 2 * info.num_mxus * info.mxu_column_size**2
        clock_hz = info.bf16_ops_per_second / flops_per_cycle
        rows = Rows(rest["table_sm"], rest["q_start_s"], rest["kv_len_s"])
        fixed = Options(**options, kv_dtype=jnp.dtype(pool.dtype), wants_lse=False)
        for kernel in call.kernels:
            if kernel == "write_pages":
                keys, num_bytes, flops = tpu_write.step_keys(pool), tpu_write.step_bytes(pool), 0
            else:
                shape = tpu.shape_of(rest["q_tnh"], pool, rows, fixed, is_decode=kernel == "decode")
                keys, num_bytes, flops = shape.chunk, shape.chunk_bytes, shape.chunk_flops
            hbm = num_bytes / info.mem_bw_bytes_per_second * clock_hz
            facts[kernel] = {"keys": keys, "bytes": num_bytes, "hbm": hbm, "mxu": flops / flops_per_cycle}
        return ragged_paged_attention(pages_pkbd=pool, **rest, **options)

    begin = time.perf_counter()
    compiled = compile_for(chip, jax.jit(attend, donate_argnums=0), pool, arrays)
    compile_s = time.perf_counter() - begin
    temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    print(json.dumps({"kernels": facts, "clock_hz": clock_hz, "compile_s": compile_s, "temp_bytes": temp_bytes}))


def versions() -> dict[str, str]:
    """Of what has made the lines."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from jaxserve.pallas_kernels.ahead_of_time import compiler_version

    return {"jax": jax.__version__, "libtpu": compiler_version()}


def lines(script: str, chip: str, model: str, name: str) -> list[dict[str, Any]]:
    """The lines of one call's kernels; `script` compiles it when started with `--one CHIP MODEL CALL`."""
    try:
        with compiled([script, "--one", chip, model, name]) as (folder, said):
            return [line(folder, chip, model, kernel, said[-1]) for kernel in CALLS[name].kernels]
    except CompilerError as error:
        raise SystemExit(f"{chip} {model} {name}: {error}") from None


class CompilerError(Exception):
    """A call could not be compiled; the text is the last line of the complaint."""


@contextlib.contextmanager
def compiled(command: list[str]) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Run a script that compiles: the folder of what the compiler dumps, and the JSON lines that the script prints."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        done = subprocess.run(
            [sys.executable, *command],
            env=os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CompilerError(done.stderr.strip().splitlines()[-1])
        yield Path(folder), [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]


def line(folder: Path, chip: str, model: str, kernel: str, said: dict[str, Any]) -> dict[str, Any]:
    """Of one kernel, from what was dumped and what `compile_one` said."""

    def dumped(stage: str) -> str:
        return next(folder.glob(f"*-{kernel}.*-[0-9][0-9]-{stage}.txt")).read_text()

    schedule = parse(dumped("final_hlo-static-per-bundle-utilization"))
    spaces, facts = memory(dumped("post-ra")), said["kernels"][kernel]
    core = schedule.core()
    return {
        "chip": chip,
        "model": model,
        "kernel": kernel,
        "keys": facts["keys"],
        "core": len(core.bundles),
        "HBM": round(facts["hbm"]),
        "MXU": round(facts["mxu"]),
        "bound / core": round(max(facts["hbm"], facts["mxu"]) / len(core.bundles), 2) if facts["mxu"] else None,
        "MXU bundles": round(core.busy("MATMUL"), 2),
        "matmul": round(core.share("MATMUL"), 2),
        "push": round(core.share("MATPUSH"), 2),
        "XLU": round(core.share("XLU"), 2),
        "VALU": round(core.share("VALU"), 2),
        "load": round(core.share("VLOAD"), 2),
        "store": round(core.share("VSTORE"), 2),
        "spills": core.total("VSTORE:SPILL"),
        "fills": core.total("VLOAD:FILL"),
        "HBM KB": round(facts["bytes"] / 1024),
        "VMEM KB": round(spaces.get("vmem", 0) / 1024),
        "SMEM KB": round(spaces.get("smem", 0) / 1024),
        "bundles": len(schedule.bundles),
        "compile s": round(said["compile_s"], 1),
        "temp MB": round(said["temp_bytes"] / 1e6, 1),
    }
