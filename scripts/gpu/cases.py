"""Every case of attention on the device, each backend against the formula, with NaN in every byte that must not be read."""

import functools
from collections.abc import Iterator, Sequence

from jaxserve.pallas_kernels.ragged_paged_attention import comparison
from jaxserve.pallas_kernels.ragged_paged_attention.cases import CASES, Case, make_arrays
from scripts.gpu.children import Result

RANDOM = "random "  # an item "random 7" is the random case of that seed
REHEARSED = ("decode", "mixed", "int8 pool")


def items(backends: Sequence[str], num_random: int, *, is_rehearsal: bool) -> list[str]:
    """`CASE | BACKEND`, a case's backends one after the other."""
    names = [*(REHEARSED if is_rehearsal else CASES), *(f"{RANDOM}{seed}" for seed in range(num_random))]
    return [f"{name} | {backend}" for name in names for backend in backends]


def run(item: str) -> Iterator[Result]:
    """One case on one backend. Nothing asks JAX for exact products: a float32 kernel must do without TF32 by itself."""
    name, backend = item.split(" | ")
    case, seed = _case(name)
    try:
        results = comparison.call(case, make_arrays(case, seed), backend, wants_lse=True)
    except NotImplementedError as refusal:
        yield Result(name, backend, "refused", str(refusal), {})
        return
    found = comparison.compare(case, results, _expected(name))
    numbers = {"dtype": case.dtype, "error": found.error, "lse_error": found.lse_error}
    yield Result(name, backend, "failed" if found.fault else "passed", found.fault, numbers)


def _case(name: str) -> tuple[Case, int]:
    if name.startswith(RANDOM):
        seed = int(name.removeprefix(RANDOM))
        return comparison.random_case(seed), seed
    return CASES[name], 0


@functools.lru_cache(maxsize=1)
def _expected(name: str) -> comparison.Results:
    case, seed = _case(name)
    return comparison.call(case, make_arrays(case, seed), "ref", wants_lse=True)
