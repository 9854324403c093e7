#!/usr/bin/env python3
"""Checks jaxserve on an NVIDIA GPU, and measures it: kernels against the formula, kernels against others', the engine.

    python scripts/gpu_check.py                          # everything; most of the time is spent compiling
    python scripts/gpu_check.py --quick                  # fewer shapes and draws
    python scripts/gpu_check.py --only cases --backends gpu
    python scripts/gpu_check.py --rehearse               # on a CPU, tiny: tries this script, measures nothing

cases    every case of attention on every backend for GPUs, with NaN in all that must not be read
kernels  bytes copied and products per second; then decodes and prefills of Llama-3.1-8B and of an eighth of its 70B, beside
         cuDNN (through JAX), tokamax, and torch's SDPA and FlexAttention, as far as they are installed (`--torch PYTHON`: in
         another environment). Times are those of a loop of calls on the device, medians of five, all contenders in turn;
         compiling is not part of them
engine   the bundled model: tokens equal to those of the CPU; throughput of Llama-3.1-8B with random weights

Exit code 0: all is well; 1: something failed; 2: there is no GPU. Measurements are appended to
benchmarks/results/gpu_check.jsonl (`--results FILE`; a rehearsal writes only if it is given).
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, whatever is installed

from benchmarks import record
from scripts.gpu import children, tables
from scripts.gpu.children import Result

SECTIONS = ("cases", "kernels", "engine")
RESULTS = Path(record.__file__).parent / "results" / "gpu_check.jsonl"
TIMEOUT_S = {"device": 120, "limits": 120, "cases": 180, "kernels": 300, "engine": 2000}  # longest silence of a child


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections, print tables, record; or, as a child, run items."""
    args = _parse(argv)
    if args.child:
        return _answer(args)
    found = _ask(args, "device", ["device"])
    if found[-1].state == "failed":
        print(f"error: JAX does not start: {found[-1].text}", file=sys.stderr)
        return 2
    device = found[-1].numbers
    print(_headline(device), flush=True)
    if device["platform"] == "cpu" and not args.rehearse:
        print("error: JAX sees no GPU; pip install 'jaxserve[gpu]', or try --rehearse", file=sys.stderr)
        return 2
    args.backends = args.backends or device["backends"]
    results = {section: _SECTIONS[section](args) for section in args.only}
    for section, found in results.items():
        print(f"\n{section}\n\n{_table(section, found, args)}\n{tables.reasons(found)}".rstrip())
        if args.results:
            _record(args.results, section, found, device)
    failed = sum(result.state == "failed" for found in results.values() for result in found)
    print(f"\n{failed} failed" if failed else "\nall is well")
    return 1 if failed else 0


def cases(args: argparse.Namespace) -> list[Result]:
    """See `scripts/gpu/cases.py`."""
    from scripts.gpu import cases

    return _ask(args, "cases", cases.items(args.backends, args.draws, is_rehearsal=args.rehearse))


def kernels(args: argparse.Namespace) -> list[Result]:
    """See `scripts/gpu/kernels.py`."""
    from scripts.gpu import kernels

    found = _ask(args, "limits", [kernels.LIMITS])
    if found[-1].state == "failed":
        return found
    args.limits = found[-1].numbers
    return found + _ask(args, "kernels", kernels.items(args))


def engine(args: argparse.Namespace) -> list[Result]:
    """See `scripts/gpu/engine.py`. What measures comes last and gets a device without other processes."""
    from scripts.gpu import engine

    *checks, measurement = engine.items(args.backends, **({"dtypes": ["float32"]} if args.rehearse else {}))
    return _ask(args, "engine", checks) + _ask(args, "engine", [measurement])


_SECTIONS = {"cases": cases, "kernels": kernels, "engine": engine}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    words = lambda text: text.split(",")  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=words, default=list(SECTIONS), help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--backends", type=words, help="of ours; default: all that are tried on a GPU")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and draws")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--draws", type=int, help="draws of each random case (default: 4; 1 when quick)")
    parser.add_argument("--page-size", type=int, default=32, help="tokens per page in measurements (default: 32)")
    parser.add_argument("--torch", metavar="PYTHON", help="interpreter that has torch (default: this one)")
    parser.add_argument("--results", type=Path, help="JSON lines are appended here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--limits", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := [name for name in args.only if name not in SECTIONS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(SECTIONS)}")
    if args.draws is None:
        args.draws = 1 if args.rehearse or args.quick else 4
    if args.results is None and not args.rehearse:
        args.results = RESULTS
    return args


def _ask(args: argparse.Namespace, section: str, items: Sequence[str]) -> list[Result]:
    """Have children do the items; say what comes."""
    command = [sys.executable, __file__, f"--child={section}", f"--draws={args.draws}", f"--page-size={args.page_size}"]
    command += [f"--{name}" for name in ("quick", "rehearse") if getattr(args, name)]
    command += [f"--backends={','.join(args.backends)}"] if args.backends else []
    command += [f"--torch={args.torch}"] if args.torch else []
    command += [f"--limits={json.dumps(args.limits)}"] if args.limits else []
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # torch needs memory too
    if section == "cases":  # XLA's products need not be fast there, and to tune them takes longer than all the rest
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    if args.rehearse:
        environment["JAX_PLATFORMS"] = "cpu"
    found = []
    for result in children.ask(command, items, TIMEOUT_S[section], environment):
        found.append(result)
        if section != "device":
            ms = f"{result.numbers['ms']:.3f} ms" if "ms" in result.numbers else ""
            words = (result.state, result.item, result.name, ms or result.text)
            print("  ".join(word for word in words if word), file=sys.stderr, flush=True)
    return found


def _answer(args: argparse.Namespace) -> int:
    """As a child."""
    if args.child == "device":
        from scripts.gpu import device

        return children.answer(device.run)
    if args.child == "cases":
        from scripts.gpu import cases

        return children.answer(cases.run)
    from scripts.gpu import engine, kernels

    run = engine.Run(args) if args.child == "engine" else kernels.Run(args)
    try:
        return children.answer(run)
    finally:
        run.close()


def _headline(device: dict[str, Any]) -> str:
    words = [device["device"]]
    if device["compute_capability"]:
        words.append(f"compute capability {device['compute_capability']}")
    if device["memory_gib"]:
        words.append(f"{device['memory_gib']} GiB for JAX")
    if device["driver"]:
        words.append(f"driver {device['driver']}")
    return ", ".join(words + [f"{name} {version}" for name, version in device["versions"].items()])


def _table(section: str, found: list[Result], args: argparse.Namespace) -> str:
    if section == "cases":
        return tables.of_cases(found)
    if section == "engine":
        return tables.of_engine(found)
    limits = found[0].numbers
    head = ""
    if limits:
        copy, matmul = limits["copy_bytes_per_s"] / 1e9, limits["matmul_flops_per_s"] / 1e12
        head = (
            f"Limits, measured: copies {copy:.0f} GB/s (read and written), bfloat16 products {matmul:.0f} TFLOP/s.\n"
            "The last columns: how many times as fast as another ours was.\n\n"
        )
    return head + tables.of_kernels(found, args.backends)


def _record(path: Path, section: str, found: list[Result], device: dict[str, Any]) -> None:
    """A line for each measurement, and one for each backend's cases."""
    about = {"benchmark": "gpu_check", "device": device["device"], "compute_capability": device["compute_capability"]}
    more = {"driver": device["driver"], "versions": device["versions"]}
    if section == "cases":
        for name in dict.fromkeys(result.name for result in found if result.name):
            states = [result.state for result in found if result.name == name]
            counts = {state: states.count(state) for state in ("passed", "refused", "failed")}
            case = about | {"engine": name}
            record.append(path, case, "cases passed", "cases", [counts["passed"]], **counts, **more)
        return
    for result in found:
        case = about | {"what": result.item, "engine": result.name}
        if section == "kernels" and result.numbers.get("seconds"):
            numbers = {name: value for name, value in result.numbers.items() if name not in ("seconds", "ms")}
            record.append(path, case, "time per call", "s", result.numbers["seconds"], **numbers, **more)
        elif result.state == "measured":
            record.append_line(path, case | result.numbers | more | {"machine": record.machine()})


if __name__ == "__main__":
    raise SystemExit(main())
