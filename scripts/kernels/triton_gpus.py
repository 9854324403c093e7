"""What NVIDIA's compiler makes of the Triton kernels of attention, without a GPU: a line for each kernel of a call."""

from typing import Any

from kernels.tpu import Call

CALLS = {
    "decode": Call(64, 64, ("attend_decodes", "merge_splits", "write_pages")),
    "mixed": Call(1024, 64, ("attend_tiles",)),
}
KERNELS = tuple(kernel for call in CALLS.values() for kernel in call.kernels)
_CAPABILITIES = {"sm_75": 75, "sm_80": 80, "sm_89": 89, "sm_90": 90, "sm_100": 100}
CHIPS = tuple(_CAPABILITIES)

ABOUT = """\
One line per compute capability, model shape and kernel, in bfloat16 with pages of 32 tokens, of calls of 64 rows with one
token each and of 1,024 tokens (`attend_tiles`). Nothing here was measured on a chip. It needs `pip install -e '.[triton]'`.

| column | |
|---|---|
| warps, stages | of a program, and chunks in flight |
| queries, keys | rows of one KV head, and keys of a chunk |
| registers | of a thread, of 255 |
| spills | instructions that store registers because there are too few, or load them again |
| SMEM KB | shared memory of a program |
| programs | that fit one multiprocessor: what its registers and shared memory allow |
| products | instructions of the matrix units in the code; none on sm_75, where all products are float32 |
| instructions | of the whole kernel |
| compile s | of the kernel, on the machine that made the table |
"""

_REGISTERS = 1 << 16  # of a multiprocessor


def compile_one(chip: str, model: str, name: str) -> None:
    """Not needed: this compiler does not read options once for a process."""
    raise SystemExit(f"{chip} {model} {name}: compiled in the process of the report")


def versions() -> dict[str, str]:
    """Of what has made the lines."""
    from importlib.metadata import version

    return {"jax": version("jax"), "triton": version("triton")}


def lines(script: str, chip: str, model: str, name: str) -> list[dict[str, Any]]:
    """The lines of one call's kernels."""
    from jaxserve.pallas_kernels.cubin import SHARED_BYTES, has_compiler
    from jaxserve.pallas_kernels.ragged_paged_attention import cases, triton, triton_ahead

    del script
    if not has_compiler():
        raise SystemExit(f"{chip} {model} {name}: Triton's compiler is missing: pip install triton (Linux)")
    call, capability = CALLS[name], _CAPABILITIES[chip]
    arrays, options = cases.shapes_of(cases.MODELS[model], num_tokens=call.num_tokens, num_rows=call.num_rows)
    done = triton_ahead.compiled(triton.Chip(capability, 100), arrays, options)
    found = []
    for kernel, (launch, cubin) in done.items():
        if kernel not in call.kernels:
            continue
        by_registers = _REGISTERS // (cubin.registers * 32 * launch.num_warps)
        by_smem = SHARED_BYTES[capability] // max(cubin.shared_bytes, 1)
        attends = kernel.startswith("attend")
        found.append(
            {
                "chip": chip,
                "model": model,
                "kernel": kernel,
                "warps": launch.num_warps,
                "stages": launch.num_stages,
                "queries": launch.shape.queries if attends else None,
                "keys": launch.shape.keys if attends else None,
                "registers": cubin.registers,
                "spills": cubin.spills,
                "SMEM KB": round(cubin.shared_bytes / 1024, 1),
                "programs": min(by_registers, by_smem),
                "products": cubin.products,
                "instructions": sum(cubin.instructions.values()),
                "compile s": round(cubin.compile_s, 1),
            }
        )
    return found
