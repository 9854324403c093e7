"""What NVIDIA's compiler makes of the Mosaic GPU kernel of attention, without a GPU: a line for each kernel of a call."""

import json
import os
import re
import subprocess
import sys
import time
from typing import Any

from kernels.tpu import MODELS, Call

CALLS = {"decode": Call(64, 64, ("decode",)), "mixed": Call(1024, 64, ("prefill",))}
KERNELS = ("decode", "prefill")
CHIPS = ("h100",)

ABOUT = """\
One line per model shape and kernel, in bfloat16 with pages of 32 tokens, of calls of 64 rows with one token each (`decode`)
and of 1,024 tokens (`prefill`). Nothing here was measured on a chip. It needs `pip install -e '.[gpu]'`.

| column | |
|---|---|
| threads | of a program: warpgroups of 128, the last of which copies |
| keys, buffers | keys of a chunk, and chunks in shared memory |
| registers | of a thread, at the start; in `prefill` the warpgroups that multiply then take 240, the other keeps 24 |
| spills, fills | bytes of a thread stored because there are too few registers, and loaded again, in the whole kernel |
| SMEM KB | shared memory of a program, of 227 |
| programs | that fit one processor: what its shared memory, registers and threads allow |
| chunk KB | what a program reads for a chunk |
| FLOPs per byte | of a chunk, rows that only fill the instruction's 64 left out. H100 has 295 for each byte of HBM |
| tensor share | of the time that HBM needs for a decode's chunk, what the tensor cores need for it, filled rows \
included; below 1 the limit is HBM |
| compile s, temp MB | of the whole call, and HBM that it needs besides arguments and results |
"""

_PEAK_FLOPS = 989e12  # bfloat16, H100 SXM data sheet
_REGISTERS, _THREADS = 1 << 16, 2048  # of a processor


def compile_one(chip: str, model: str, name: str) -> None:
    """In a process of its own, whose stderr the compiler writes to: print what the table needs as JSON."""
    import jax
    import jax.numpy as jnp

    from jaxserve.pallas_kernels.ahead_of_time import compile_for
    from jaxserve.pallas_kernels.ragged_paged_attention import cases, gpu
    from jaxserve.pallas_kernels.ragged_paged_attention.op import ragged_paged_attention
    from jaxserve.pallas_kernels.ragged_paged_attention.signature import Options, Rows

    call, sizes = CALLS[name], cases.MODELS[model]
    arrays, options = cases.shapes_of(sizes, num_tokens=call.num_tokens, num_rows=call.num_rows)
    pool = arrays.pop("pages_pkbd")
    rows = Rows(arrays["table_sm"], arrays["q_start_s"], arrays["kv_len_s"])
    fixed = Options(**options, kv_dtype=jnp.dtype(pool.dtype), wants_lse=False)
    shape = gpu.shape_of(arrays["q_tnh"], pool, rows, fixed, is_decode=name == "decode")
    jitted = jax.jit(
        lambda pool, rest: ragged_paged_attention(pages_pkbd=pool, **rest, **options, impl="gpu"), donate_argnums=0
    )
    begin = time.perf_counter()
    memory = compile_for(chip, jitted, pool, arrays).memory_analysis()
    compile_s = time.perf_counter() - begin
    filled = 64 * shape.num_workers
    useful = shape.group if shape.is_decode else filled
    facts = {
        "threads": 128 * (shape.num_workers + 1),
        "keys": shape.chunk,
        "buffers": shape.num_buffers,
        "smem": shape.smem_bytes,
        "chunk_bytes": shape.chunk_bytes,
        "flops": 4 * useful * shape.chunk * shape.head_size,
        "filled_flops": 4 * filled * shape.chunk * shape.head_size,
        "compile_s": compile_s,
        "temp_bytes": memory.temp_size_in_bytes,
    }
    print(json.dumps(facts))


def versions() -> dict[str, str]:
    """Of what has made the lines."""
    from importlib.metadata import version

    return {"jax": version("jax"), "nvcc": version("nvidia-cuda-nvcc")}


def lines(script: str, chip: str, model: str, name: str) -> list[dict[str, Any]]:
    """The lines of one call's kernels; `script` compiles it when started with `--one CHIP MODEL CALL`."""
    done = subprocess.run(
        [sys.executable, script, "--one", chip, model, name],
        env=os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{chip} {model} {name}: {done.stderr.strip().splitlines()[-1]}")
    *compiler, said = done.stdout.splitlines()
    facts, text = json.loads(said), "\n".join([*compiler, done.stderr])
    return [_line(chip, model, kernel, facts, text) for kernel in CALLS[name].kernels]


def _line(chip: str, model: str, kernel: str, facts: dict[str, Any], text: str) -> dict[str, Any]:
    from jaxserve.pallas_kernels.chips import GPUS

    said = re.search(
        rf"{kernel}_mosaic_gpu_kernel\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers",
        text,
    )
    if said is None:
        raise SystemExit(f"the compiler said nothing of {kernel}")
    spills, fills, registers = map(int, said.groups())
    gpu = GPUS[chip]
    fits = (
        gpu.smem_bytes // (facts["smem"] + 1024),
        _REGISTERS // (registers * facts["threads"]),
        _THREADS // facts["threads"],
    )
    hbm_s = facts["chunk_bytes"] / gpu.hbm_bytes_per_s
    return {
        "chip": chip,
        "model": model,
        "kernel": kernel,
        "threads": facts["threads"],
        "keys": facts["keys"],
        "buffers": facts["buffers"],
        "registers": registers,
        "spills": spills,
        "fills": fills,
        "SMEM KB": round(facts["smem"] / 1024),
        "programs": min(fits),
        "chunk KB": round(facts["chunk_bytes"] / 1024),
        "FLOPs per byte": round(facts["flops"] / facts["chunk_bytes"], 1),
        "tensor share": round(facts["filled_flops"] / _PEAK_FLOPS / hbm_s, 2) if kernel == "decode" else None,
        "compile s": round(facts["compile_s"], 1),
        "temp MB": round(facts["temp_bytes"] / 1e6, 1),
    }


__all__ = ["ABOUT", "CALLS", "CHIPS", "KERNELS", "MODELS", "compile_one", "lines", "versions"]
