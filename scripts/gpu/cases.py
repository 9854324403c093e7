"""Every case of attention on the device, each backend against the formula, with NaN in every byte that must not be read."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from jaxserve.pallas_kernels.ragged_paged_attention import comparison
from jaxserve.pallas_kernels.ragged_paged_attention.cases import CASES, Case, make_arrays, ragged, ragged_moulds
from scripts.gpu.children import Result

REHEARSED = ("decode", "mixed", "int8 pool")
_DRAW = ", draw "  # MOULD, draw SEED: random rows for a mould of `cases.py`


def items(backends: Sequence[str], num_draws: int, *, is_rehearsal: bool) -> list[str]:
    """`CASE | BACKEND`, a case's backends one after the other, and all draws of a mould, which share their programs."""
    moulds = list(ragged_moulds())[: 1 if is_rehearsal else None]
    names = [*(REHEARSED if is_rehearsal else CASES)]
    names += [f"{mould}{_DRAW}{seed}" for mould in moulds for seed in range(num_draws)]
    return [f"{name} | {backend}" for name in names for backend in backends]


def run(item: str) -> Iterator[Result]:
    """One case on one backend; a draw that it refuses is also tried in bfloat16, which every kernel takes.

    Nothing asks JAX for exact products: a float32 kernel must do without TF32 by itself.
    """
    name, backend = item.split(" | ")
    case, seed = _case(name)
    result = _result(name, backend, case, seed)
    yield result
    if result.state == "refused" and _DRAW in name:
        case = dataclasses.replace(case, dtype="bfloat16", kv_dtype=None)
        yield _result(f"{name}, in bfloat16", backend, case, seed)


def _case(name: str) -> tuple[Case, int]:
    if _DRAW not in name:
        return CASES[name], 0
    mould, seed = name.split(_DRAW)
    index = list(ragged_moulds()).index(mould)
    return ragged(ragged_moulds()[mould], 1000 * index + int(seed), only_decodes=index % 4 == 3), int(seed)


def _result(name: str, backend: str, case: Case, seed: int) -> Result:
    try:
        results = _call(case, seed, backend)
    except NotImplementedError as refusal:
        return Result(name, backend, "refused", str(refusal), {})
    found = comparison.compare(case, results, _expected(case, seed))
    numbers = {"dtype": case.dtype, "error": found.error, "lse_error": found.lse_error}
    return Result(name, backend, "failed" if found.fault else "passed", found.fault, numbers)


@functools.lru_cache(maxsize=2)
def _expected(case: Case, seed: int) -> comparison.Results:
    return _call(case, seed, "ref")


def _call(case: Case, seed: int, backend: str) -> comparison.Results:
    return comparison.call(case, make_arrays(case, seed), backend, wants_lse=True, make_program=_program)


_program = functools.lru_cache(maxsize=16)(comparison.program)
