"""Cases of the grouped product, for tests and benchmarks alike: small ones with values, and the shapes of real models."""

import dataclasses
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One call: rows of each group, then `spare` rows of no group."""

    sizes: tuple[int, ...]
    spare: int = 0
    width: int = 24
    size: int = 40
    dtype: str = "float32"

    @property
    def num_rows(self) -> int:
        """Of all groups and of none."""
        return sum(self.sizes) + self.spare


CASES: dict[str, Case] = {
    "one row": Case(sizes=(1,)),
    "one group": Case(sizes=(37,)),
    "equal groups": Case(sizes=(8, 8, 8)),
    "ragged": Case(sizes=(3, 0, 17, 1, 9), spare=5),
    "empty groups at both ends": Case(sizes=(0, 0, 5, 0, 0)),
    "all rows in the last group": Case(sizes=(0, 0, 0, 70), spare=1),
    "all rows in the first group": Case(sizes=(70, 0, 0, 0), spare=9),
    "nothing at all": Case(sizes=(0, 0, 0), spare=6),
    "long groups": Case(sizes=(130, 64, 65), spare=3),
    "one more than a tile": Case(sizes=(9, 17, 8, 33)),
    "odd sizes": Case(sizes=(2, 5, 1), width=37, size=19, spare=2),
    "bfloat16": Case(sizes=(3, 0, 17, 1, 9), spare=5, dtype="bfloat16"),
    "bfloat16, odd sizes": Case(sizes=(2, 5, 0, 70), width=37, size=19, spare=2, dtype="bfloat16"),
    "float16": Case(sizes=(3, 0, 17), spare=5, dtype="float16"),
}


def make_arrays(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs, float32 save for the sizes; rows of no group and weights of empty groups are NaN."""
    rng = np.random.default_rng(seed)
    x_mi = rng.standard_normal((case.num_rows, case.size), dtype=np.float32)
    x_mi[sum(case.sizes) :] = np.nan
    w_xoi = rng.standard_normal((len(case.sizes), case.width, case.size), dtype=np.float32)
    w_xoi[np.array(case.sizes) == 0] = np.nan
    return {"x_mi": x_mi, "w_xoi": w_xoi, "sizes_x": np.array(case.sizes, np.int32)}


class ModelShape(NamedTuple):
    """Experts of a real model."""

    num_experts: int
    per_token: int
    embed_size: int
    ffn_size: int


MODELS = {
    "mixtral-8x7b": ModelShape(8, 2, 4096, 14336),
    "qwen1.5-moe-a2.7b": ModelShape(60, 4, 2048, 1408),
    "qwen3-30b-a3b": ModelShape(128, 8, 2048, 768),
    "64-experts": ModelShape(64, 8, 1024, 512),
}


def routed_sizes(num_tokens: int, num_experts: int, per_token: int, seed: int = 0) -> np.ndarray:
    """Rows of each group if every token is given to `per_token` different experts at random, i32[x]."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(num_experts)[:per_token] for _ in range(num_tokens)]
    return np.bincount(np.concatenate(chosen), minlength=num_experts).astype(np.int32)
