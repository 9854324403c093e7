"""What a step's devices tell each other, by the part of the step that makes them."""

import re
from collections.abc import Iterable

from jaxserve.sharding.hlo import Collective

_SUMS = ("all-reduce", "reduce-scatter")  # all other kinds move arrays as they are


def by_part(found: Iterable[Collective]) -> dict[str, list[Collective]]:
    """Those between at least two devices, by part: "embed", "layer0", ..., "sample", "prompt_logprobs"."""
    parts: dict[str, list[Collective]] = {}
    for one in found:
        if one.group_size > 1:
            scope = re.search(r"/(layer\d+|sample|prompt_logprobs)/", one.op_name)
            parts.setdefault(scope[1] if scope else "embed", []).append(one)
    return parts


def moved_arrays(found: Iterable[Collective], at_least_bytes: int) -> list[Collective]:
    """Those that hand on arrays, not sums, and leave at least so much on a device: with the size of a weight or of the
    pool, they are what no step should do."""
    return [one for one in found if one.kind not in _SUMS and one.group_size > 1 and one.result_bytes >= at_least_bytes]
