"""Our attention and others' on one scenario, measured in turn.

Each contender is compiled once, as a loop of calls on the device; then all run in turn, `repeats` times, so that a chip that
slows down for a while slows all of them. What they compute is compared too: a fast wrong result is worth nothing.
"""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.kernels.contenders import (
    JAX_PEERS,
    TORCH_PEERS,
    Contender,
    Pool,
    Torch,
    TorchContender,
    exact,
    jax_xla,
    ours,
)
from benchmarks.kernels.limits import Limits
from benchmarks.kernels.scenario import CACHED_BYTES, Inputs, Scenario, make_inputs
from benchmarks.kernels.timing import num_calls

OURS = ("gpu", "triton")  # "xla" is measured when it is asked for, or where these refuse
REHEARSED = "jax xla"
_SLOW_S = 2.0  # a run that takes so long is not repeated
_MOST_DIFFERENCE = 2e-2  # relative; bfloat16 keeps 8 bits
_MOST_ERROR = 2.0  # times that of the most exact peer
_EXACT_BYTES = 64 << 20  # of keys and values, up to which results are compared with those of float32


class Measured(NamedTuple):
    """One contender on one scenario."""

    name: str
    seconds: list[float]  # per call; empty if it did not run
    reason: str  # why it did not
    is_fault: bool  # whether that is a defect of ours
    compile_s: float
    numbers: dict[str, Any]


def measure(
    scenario: Scenario, limits: Limits, backends: Sequence[str], *, torch: Torch | None, page_size: int, repeats: int
) -> list[Measured]:
    """All contenders on a scenario; ours first."""
    inputs = make_inputs(scenario, page_size)
    pool = Pool(inputs.pages_pkbd)
    inputs = inputs._replace(pages_pkbd=pool.pages_pkbd[:0])  # the pool is given away by the first run
    number = num_calls(_bound_s(scenario, limits))
    running, failed = _prepare(scenario, inputs, pool, backends, torch, number)
    seconds = _run_in_turn(running, failed, backends, repeats, number)
    is_small = scenario.dense_bytes <= _EXACT_BYTES and scenario.queries in (1, scenario.context)
    differences = _differences(running, backends, exact(scenario, inputs) if is_small else None)
    peers = [difference for name, difference in differences.items() if name not in backends]
    allowed = _MOST_ERROR * min(peers) if is_small and peers else _MOST_DIFFERENCE
    found = []
    for name, contender in running.items():
        compile_s = contender.compile_s if isinstance(contender, TorchContender) else contender.loop.compile_s
        numbers = _numbers(scenario, limits, statistics.median(seconds[name]))
        wrong = ""
        if name in differences:
            numbers["error" if is_small else "difference"] = differences[name]
            if not differences[name] <= allowed:
                wrong = f"its results are off by {differences[name]:.2%}, allowed is {allowed:.2%}"
        found.append(Measured(name, seconds[name], wrong, bool(wrong) and name in backends, compile_s, numbers))
    if torch is not None:
        torch.clear()
    return found + failed


def _run_in_turn(
    running: dict[str, Contender | TorchContender],
    failed: list[Measured],
    backends: Sequence[str],
    repeats: int,
    number: int,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, without its first run. One that fails goes from `running` to `failed`."""
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(repeats + 1):
        for name, contender in list(running.items()):
            if turn >= 2 and seconds[name][-1] * number > _SLOW_S:
                continue
            try:
                seconds[name].append(contender.seconds())
            except Exception as error:  # noqa: BLE001 - as in `_prepare`
                del running[name]
                failed.append(Measured(name, [], _said(error), name in backends, 0.0, {}))
    return {name: seconds[name][1:] for name in running}


def _prepare(
    scenario: Scenario,
    inputs: Inputs,
    pool: Pool,
    backends: Sequence[str],
    torch: Torch | None,
    number: int,
) -> tuple[dict[str, Contender | TorchContender], list[Measured]]:
    """What can run, and why the others cannot. A backend of ours that fails other than by refusing is a fault."""
    makers = {name: lambda name=name: ours(name, scenario, inputs, pool, number) for name in backends}
    if jax.default_backend() == "cpu":
        peers: dict[str, Any] = {REHEARSED: jax_xla, "tokamax": JAX_PEERS["tokamax"]}
    else:
        peers = dict(JAX_PEERS)
    makers |= {name: lambda make=make: make(scenario, inputs, number) for name, make in peers.items()}
    if torch is not None:
        makers |= {name: lambda name=name: torch.prepare(name, scenario, number) for name in TORCH_PEERS}
    fallback = makers.pop("xla", None) if any(name in OURS for name in backends) else None
    running: dict[str, Contender | TorchContender] = {}
    failed: list[Measured] = []

    def start(name: str, make: Any) -> None:
        try:
            running[name] = make()
        except NotImplementedError as refusal:
            failed.append(Measured(name, [], str(refusal), False, 0.0, {}))
        except Exception as error:  # noqa: BLE001 - a peer may fail in any way; the others are still to be measured
            failed.append(Measured(name, [], _said(error), name in backends, 0.0, {}))

    for name, make in makers.items():
        start(name, make)
    if fallback and not any(name in running for name in OURS):
        start("xla", fallback)
    return running, failed


def _bound_s(scenario: Scenario, limits: Limits) -> float:
    """The least that a call can take."""
    return max(scenario.num_bytes / limits.copy_bytes_per_s, scenario.flops / limits.matmul_flops_per_s)


def _numbers(scenario: Scenario, limits: Limits, seconds: float) -> dict[str, Any]:
    """Rates, and shares of what the device can do. No share of the memory's rate where a cache holds all."""
    gb_per_s, tflops = scenario.num_bytes / seconds / 1e9, scenario.flops / seconds / 1e12
    numbers: dict[str, Any] = {"ms": seconds * 1e3, "gb_per_s": gb_per_s, "tflops": tflops, "share": None}
    if not scenario.is_decode:
        numbers["share"] = tflops * 1e12 / limits.matmul_flops_per_s
    elif scenario.kv_bytes >= CACHED_BYTES:
        numbers["share"] = gb_per_s * 1e9 / limits.copy_bytes_per_s
    return numbers


def _differences(
    running: dict[str, Contender | TorchContender], backends: Sequence[str], expected: np.ndarray | None
) -> dict[str, float]:
    """Of each result from the exact one, or else from a peer's (if there is none, from the first): the norm of the
    difference over the norm. What torch computes stays in its process."""
    results = {name: one.result for name, one in running.items() if isinstance(one, Contender)}
    if expected is None and results:
        expected = results[next((name for name in results if name not in backends), next(iter(results)))]
    return {name: float(np.linalg.norm(out - expected) / np.linalg.norm(expected)) for name, out in results.items()}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
