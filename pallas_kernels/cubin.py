"""Compiling Triton kernels for NVIDIA GPUs that are not here: the `triton` package brings NVIDIA's assembler along.

What comes out can be looked at (registers, shared memory, spills, instructions) and not be run.
"""
# pyright: reportMissingImports=false

import collections
import dataclasses
import importlib.util
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.pallas_kernels.chips import GPUS

CAPABILITIES = {chip: GPUS[chip].compute for chip in ("t4", "a100-80gb", "l4", "h100", "b200")}  # one chip of each
SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # of one program, at most;
# CUDA C++ programming guide, table "Technical Specifications per Compute Capability"

_TYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
    "int8": "i8",
    "int32": "i32",
    "uint8": "u8",
    "uint16": "u16",
    "uint32": "u32",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cubin:
    """What the compiler made of a kernel."""

    registers: int  # of a thread, of at most 255
    shared_bytes: int  # of a program
    stack_bytes: int  # of a thread
    instructions: Mapping[str, int]  # how often each occurs in the code
    compile_s: float

    @property
    def spills(self) -> int:
        """Instructions that move registers to memory or back, because there are too few."""
        return self.count("STL") + self.count("LDL")

    @property
    def products(self) -> int:
        """Instructions of the matrix unit."""
        return self.count("HMMA") + self.count("HGMMA") + self.count("UTCHMMA")

    def count(self, name: str) -> int:
        """Instructions of a name, whatever follows its first dot."""
        return sum(n for full, n in self.instructions.items() if full.split(".")[0] == name)


def has_compiler() -> bool:
    """Whether the triton package is installed."""
    return importlib.util.find_spec("triton") is not None


def type_name(dtype: Any) -> str:
    """Triton's name of a pointer to numbers of a type."""
    return f"*{_TYPES[str(dtype)]}"


def compile_for(
    capability: int,
    kernel: Any,
    arguments: Sequence[str | int],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int,
) -> Cubin:
    """Compile a `triton.jit` function for a compute capability.

    Args:
      arguments: of each argument that is no constant, in order, `type_name` of an array, or an integer as an example.
      constants: the other arguments, by name.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in kernel.arg_names if name not in constants]
    signature, attributes, values = {}, {}, dict(constants)
    for index, (name, argument) in enumerate(zip(names, arguments, strict=True)):
        if isinstance(argument, str):
            signature[name] = argument
            attributes[(index,)] = [["tt.divisibility", 16]]  # XLA's buffers begin at multiples of more
        elif argument == 1:  # as at run time
            signature[name], values[name] = "constexpr", 1
        else:
            signature[name] = "i32"
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    begin = time.perf_counter()
    with knobs.compilation.scope():
        knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    compile_s = time.perf_counter() - begin
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            _cuobjdump(knobs.nvidia.cuobjdump.path, option, file.name)
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    facts = dict(re.findall(r"\b(REG|STACK):(\d+)", usage))
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE)
    return Cubin(
        registers=int(facts["REG"]),
        shared_bytes=compiled.metadata.shared,
        stack_bytes=int(facts["STACK"]),
        instructions=collections.Counter(opcodes),
        compile_s=compile_s,
    )


def _cuobjdump(tool: str, option: str, path: str) -> str:
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout  # noqa: S603
