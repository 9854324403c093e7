"""Which models are compiled for which slices."""

import dataclasses
from typing import Any

from jaxserve.models.published import MODELS
from jaxserve.sharding.mesh import Parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a slice."""

    slice: str  # Google's name
    topology: str  # chips along the axes of the torus, see `ahead_of_time.slice_devices`
    model: str  # of `models.published`
    parallel: Parallel

    @property
    def config(self) -> dict[str, Any]:
        """What its config.json says."""
        return MODELS[self.model]


CASES = (
    Case(
        slice="v5e-4",
        topology="v5e:2x2",
        model="llama-3.1-8b",
        parallel=Parallel(tensor=4),
    ),
    Case(
        slice="v6e-8",
        topology="v6e:2x4",
        model="llama-3.3-70b",
        parallel=Parallel(tensor=8),
    ),
    Case(
        slice="v5p-8",
        topology="v5p:2x2x1",
        model="llama-3.3-70b",
        parallel=Parallel(tensor=4),
    ),
    Case(
        slice="v6e-4",
        topology="v6e:2x2",
        model="qwen3-30b-a3b",
        parallel=Parallel(expert=4),
    ),
    Case(
        slice="v5e-8",
        topology="v5e:2x4",
        model="mixtral-8x7b",
        parallel=Parallel(expert=4, tensor=2),
    ),
    Case(
        slice="v5p-32",
        topology="v5p:2x2x4",
        model="like-deepseek-v3",
        parallel=Parallel(expert=16),
    ),
)
