#!/usr/bin/env python3
"""What the TPU compiler makes of our kernels, without a TPU: a table of the schedule of each, per chip and model shape.

    python scripts/kernel_report.py                                    # prints a Markdown table
    python scripts/kernel_report.py --chips v5e,v6e --models llama-3-8b --write docs/kernels.md

Needs `pip install libtpu`, or TPU_LIBRARY_PATH. The compiler writes, for every bundle of instructions (one per cycle), how
many of each unit's slots it uses. The *core* of a kernel is what lies between the first and the last bundle that uses the
matrix unit: for attention, one chunk of keys of all heads of a grid step. Bundles are a lower bound of cycles. `HBM` is
how many cycles the chip's memory needs to deliver the chunk, `MXU` how many its matrix units need at full rate; the
larger one is the bound. Above 1, memory is slower than the core. The other columns are shares of slots in the core.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = {"decode": (64, 64), "prefill": (1024, 64)}  # kernel -> tokens and rows of the call that has it
COMMON = ["llama-3-8b", "llama-3-70b-tp8", "llama-3.2-1b", "gemma-2"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Slots that the bundles of a kernel use."""

    names: list[str]
    capacity: list[int]
    bundles: list[list[int]]

    def core(self) -> "Schedule":
        """The bundles from the first to the last that uses the matrix unit; all of them if none does."""
        matrix = [self.names.index("MATMUL"), self.names.index("MATPUSH")]
        busy = [i for i, used in enumerate(self.bundles) if any(used[unit] for unit in matrix)]
        return dataclasses.replace(self, bundles=self.bundles[busy[0] : busy[-1] + 1]) if busy else self

    def total(self, name: str) -> int:
        """Slots used of one unit."""
        return sum(used[self.names.index(name)] for used in self.bundles)

    def share(self, name: str) -> float:
        """Part of a unit's slots that is used."""
        return self.total(name) / max(len(self.bundles) * self.capacity[self.names.index(name)], 1)


def parse(text: str) -> Schedule:
    """Read the compiler's table of slots per bundle."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("MATMUL"))
    names = [name.strip() for name in lines[start].split(",")]
    numbers = [[int(x) for x in line.split()] for line in lines[start + 1 :] if line.strip() and "=" not in line]
    return Schedule(names, numbers[0], numbers[1:])


def compile_one(chip: str, model: str, kernel: str) -> None:
    """In a process of its own, because the compiler reads its options once: print what the table needs as JSON."""
    import jax
    from jax.experimental.pallas import tpu as pltpu

    from jaxserve.pallas_kernels.ahead_of_time import compile_for
    from jaxserve.pallas_kernels.ragged_paged_attention import tuned
    from jaxserve.pallas_kernels.ragged_paged_attention.cases import MODELS, shapes_of
    from jaxserve.pallas_kernels.ragged_paged_attention.op import ragged_paged_attention

    shape, (num_tokens, num_rows) = MODELS[model], ROWS[kernel]
    arrays, options = shapes_of(shape, num_tokens=num_tokens, num_rows=num_rows)
    pool = arrays.pop("pages_pkbd")
    facts = {}

    def attend(pool, rest):
        info = pltpu.get_tpu_info()
        heads = shape.num_kv_heads if kernel == "decode" else 1
        token_bytes = heads * pool.shape[-1] * pool.dtype.itemsize
        keys = tuned.chunk(token_bytes, is_decode=kernel == "decode")
        queries = shape.num_heads // shape.num_kv_heads * (1 if kernel == "decode" else tuned.query_tile())
        flops_per_cycle = 2 * info.num_mxus * info.mxu_column_size**2
        clock = info.bf16_ops_per_second / flops_per_cycle
        facts["chunk"] = keys
        facts["hbm_cycles"] = keys * token_bytes / info.mem_bw_bytes_per_second * clock
        facts["mxu_cycles"] = heads * 4 * queries * keys * shape.head_size / flops_per_cycle
        return ragged_paged_attention(pages_pkbd=pool, **rest, **options)

    begin = time.perf_counter()
    compiled = compile_for(chip, jax.jit(attend, donate_argnums=0), pool, arrays)
    facts["compile_s"] = time.perf_counter() - begin
    facts["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
    facts["jax"] = jax.__version__
    print(json.dumps(facts))


def report(chip: str, model: str, kernel: str) -> dict[str, object]:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        done = subprocess.run(
            [sys.executable, __file__, "--one", chip, model, kernel],
            env=os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{chip} {model} {kernel}: {done.stderr.strip().splitlines()[-1]}")
        files = list(Path(folder).glob(f"*-{kernel}.*final_hlo-static-per-bundle-utilization.txt"))
        schedule = parse(files[0].read_text())
    core = schedule.core()
    facts = json.loads(done.stdout.splitlines()[-1])
    bound = max(facts["hbm_cycles"], facts["mxu_cycles"])
    return {
        "chip": chip,
        "model": model,
        "kernel": kernel,
        "keys": facts["chunk"],
        "bundles": len(schedule.bundles),
        "core": len(core.bundles),
        "HBM": round(facts["hbm_cycles"]),
        "MXU": round(facts["mxu_cycles"]),
        "bound / core": round(min(bound / len(core.bundles), 9.99), 2),
        "matmul": round(core.share("MATMUL"), 2),
        "push": round(core.share("MATPUSH"), 2),
        "VALU": round(core.share("VALU"), 2),
        "load": round(core.share("VLOAD"), 2),
        "store": round(core.share("VSTORE"), 2),
        "spills": core.total("VSTORE:SPILL"),
        "fills": core.total("VLOAD:FILL"),
        "compile s": round(facts["compile_s"], 1),
        "temp MB": round(facts["temp_bytes"] / 1e6, 1),
    }


def table(lines: list[dict[str, object]]) -> str:
    """Markdown."""
    rows = [list(lines[0]), ["---"] * 3 + ["--:"] * (len(lines[0]) - 3), *(list(line.values()) for line in lines)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def main(argv: list[str] | None = None) -> int:
    words = lambda text: text.split(",")  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=words, default=["v5e", "v5p", "v6e", "tpu7x"])
    parser.add_argument("--models", type=words, default=COMMON, help="names in ragged_paged_attention/cases.py")
    parser.add_argument("--kernels", type=words, default=list(ROWS))
    parser.add_argument("--write", type=Path, help="a Markdown file to write, with JSON lines beside it")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        compile_one(*args.one)
        return 0
    lines = []
    for chip in args.chips:
        for model in args.models:
            for kernel in args.kernels:
                lines.append(report(chip, model, kernel))
                print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    print(table(lines))
    if args.write:
        about = "\n".join(__doc__.strip().splitlines()[5:])
        command = "python scripts/kernel_report.py " + " ".join(sys.argv[1:] if argv is None else argv)
        args.write.write_text(
            f"# Kernels, as the TPU compiler schedules them\n\n`{command}`\n\n{about}\n\n{table(lines)}\n"
        )
        args.write.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
