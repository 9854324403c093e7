"""Judging block sizes by timing calls on this machine's device."""

import functools
import importlib.metadata
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from tuning.climb import Judge, Judged, RefusedError

PAGE_SIZE, REPEATS = 32, 5
_MOST_DIFFERENCE = 2e-2  # relative; bfloat16 keeps 8 bits
_ASSUMED_FLOPS, _ASSUMED_BYTES = 1e15, 3e12  # only to choose how many calls a loop has


def judge(model: str, call: str, backend: str | None) -> Judge:
    """Of decodes at several batches and contexts, or ("mixed") of prompts.

    Raises: SystemExit, on a CPU; NotImplementedError, if no kernel of ours takes the calls.
    """
    import jax

    from jaxserve.pallas_kernels.ragged_paged_attention.op import ORDER

    platform = jax.devices()[0].platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    if platform == "cpu":
        raise SystemExit("there is no TPU or GPU to time on; give --chips to go by the TPU compiler's schedule")
    impl = backend or ORDER[platform][0]
    versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    if impl == "triton":
        versions["triton"] = importlib.metadata.version("triton")
    results: dict[str, np.ndarray] = {}  # of the rules' choices, which the others' must equal
    return Judge(functools.partial(_cost, model, call, impl, results), "timing", model, versions)


def _cost(model: str, call: str, impl: str, results: dict[str, np.ndarray], choices: Mapping[str, Any]) -> Judged:
    from jaxserve.pallas_kernels.ragged_paged_attention import tuned

    costs = {}
    tuned.table.asked.clear()
    for scenario in scenarios(model, call):
        try:
            with tuned.table.trying(choices):
                costs[scenario.name], result = measure(scenario, impl)
        except Exception as error:  # a candidate may be too large for the chip in ways that only its compiler knows
            if not choices:
                raise
            raise RefusedError(str(error)) from error
        expected = results.setdefault(scenario.name, result)
        if not np.linalg.norm(result - expected) < _MOST_DIFFERENCE * np.linalg.norm(expected):
            raise RefusedError("other results")
    answers = {question: asked.choice for question, asked in tuned.table.asked.items()}
    return Judged(costs, answers)


def scenarios(model: str, call: str) -> list[Any]:
    """Lengths that a choice has to be good for."""
    from benchmarks.kernels.scenario import Scenario

    if call == "decode":
        sizes = ((1, 8192, 1), (16, 4096, 1), (64, 8192, 1), (128, 1024, 1))
    else:
        sizes = ((1, 2048, 2048), (1, 8192, 8192))
    return [Scenario(model=model, batch=b, context=c, queries=q) for b, c, q in sizes]


def measure(scenario: Any, impl: str) -> tuple[float, np.ndarray]:
    """Seconds of a call, median; and its result."""
    from benchmarks.kernels.contenders import Pool, ours
    from benchmarks.kernels.scenario import make_inputs
    from benchmarks.kernels.timing import num_calls

    inputs = make_inputs(scenario, PAGE_SIZE)
    bound_s = max(scenario.num_bytes / _ASSUMED_BYTES, scenario.flops / _ASSUMED_FLOPS)
    contender = ours(impl, scenario, inputs, Pool(inputs.pages_pkbd), num_calls(bound_s))
    contender.seconds()
    return statistics.median(contender.seconds() for _ in range(REPEATS)), contender.result
