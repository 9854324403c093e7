"""Attention measured: what the device can do, then every scenario."""

import argparse
import contextlib
import sys
from collections.abc import Iterator

import jax

from benchmarks.kernels import limits, ragged_paged_attention
from benchmarks.kernels.contenders import Torch
from benchmarks.kernels.scenario import Scenario, rehearsal, scenarios
from scripts.gpu.children import Result

LIMITS = "limits"  # the item that measures them; all others need them


def items(args: argparse.Namespace) -> list[str]:
    """Names of the scenarios."""
    return list(_scenarios(args))


class Run:
    """Runs items; a process with torch lives as long as this one."""

    def __init__(self, args: argparse.Namespace):
        self._args, self._torch, self._no_torch = args, None, ""

    def __call__(self, item: str) -> Iterator[Result]:
        """The limits, or one scenario."""
        if item == LIMITS:
            sizes = {"copy_bytes": 1 << 22, "matrix": 128} if self._args.rehearse else {}
            yield Result(item, "", "measured", "", limits.measure(**sizes)._asdict())
            return
        scenario = _scenarios(self._args)[item]
        memory_bytes = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
        if memory_bytes and 5 * scenario.dense_bytes > memory_bytes:
            yield Result(item, "", "skipped", f"needs {5 * scenario.dense_bytes / 2**30:.0f} GiB", {})
            return
        self._start_torch()
        found = ragged_paged_attention.measure(
            scenario,
            limits.Limits(**self._args.limits),
            self._args.backends,
            torch=self._torch,
            page_size=self._args.page_size,
            repeats=2 if self._args.rehearse else 5,
        )
        for one in found:
            state = "failed" if one.is_fault else "measured" if one.seconds else "refused"
            numbers = one.numbers | {"seconds": one.seconds, "compile_s": one.compile_s, "kind": _kind(scenario)}
            yield Result(item, one.name, state, one.reason, numbers)
        if self._no_torch:
            yield Result(item, "torch", "refused", self._no_torch, {})

    def _start_torch(self) -> None:
        if self._torch is None and not self._no_torch:
            try:
                self._torch = Torch(self._args.torch or sys.executable)
            except (NotImplementedError, OSError) as refusal:
                self._no_torch = str(refusal)

    def close(self) -> None:
        """End the process with torch."""
        if self._torch is not None:
            with contextlib.suppress(NotImplementedError):
                self._torch.close()


def _scenarios(args: argparse.Namespace) -> dict[str, Scenario]:
    found = rehearsal() if args.rehearse else scenarios(is_quick=args.quick)
    return {scenario.name: scenario for scenario in found}


def _kind(scenario: Scenario) -> str:
    return "decode" if scenario.is_decode else "prefill"
