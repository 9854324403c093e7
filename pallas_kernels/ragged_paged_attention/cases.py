"""Cases of ragged paged attention, for tests, reports and benchmarks alike: small ones with values, named or drawn at
random, and the shapes of real models without."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One call. `rows` lists (tokens of the row, queries of the row); `padding` tokens follow the last row."""

    rows: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 16
    page_size: int = 16
    window: int | None = None
    dtype: str = "float32"
    kv_dtype: str | None = None  # as `dtype`
    soft_cap: float | None = None
    has_sinks: bool = False
    padding: int = 3
    spare_columns: int = 2  # table columns that no row needs
    num_pages: int | None = None  # of the pool; as many as are needed, and five, if None

    @property
    def max_q_len(self) -> int | None:
        """What may be promised: 1 if the rows are all decodes."""
        return 1 if max((q for _, q in self.rows), default=0) == 1 else None

    @property
    def num_tokens(self) -> int:
        """Tokens of the call, padding included."""
        return sum(q for _, q in self.rows) + self.padding


CASES: dict[str, Case] = {
    "one token": Case(rows=((1, 1),)),
    "decode": Case(rows=((37, 1), (16, 1), (1, 1), (90, 1))),
    "decode, more rows than a group": Case(rows=tuple((3 * i + 1, 1) for i in range(19))),
    "decode past several chunks": Case(rows=((700, 1), (5, 1), (257, 1)), page_size=32),
    "whole prompt": Case(rows=((45, 45),)),
    "prompt longer than a tile": Case(rows=((300, 300),), page_size=32),
    "chunk of a long prompt": Case(rows=((600, 140),), page_size=64),
    "mixed": Case(rows=((33, 1), (50, 20), (64, 64), (17, 1), (90, 2))),
    "exactly full pages": Case(rows=((32, 1), (64, 32), (16, 16))),
    "empty rows": Case(rows=((0, 0), (20, 1), (0, 0), (30, 30), (0, 0))),
    "nothing at all": Case(rows=((0, 0), (0, 0))),
    "no padding": Case(rows=((8, 8), (9, 1)), padding=0),
    "multi-head": Case(rows=((33, 1), (20, 20)), num_heads=4, num_kv_heads=4),
    "one kv head": Case(rows=((33, 1), (20, 20)), num_heads=6, num_kv_heads=1),
    "head 64": Case(rows=((70, 1), (40, 40)), head_size=64),
    "head 80": Case(rows=((70, 1), (40, 40)), head_size=80),
    "head 128": Case(rows=((70, 1), (40, 40)), head_size=128),
    "page 128": Case(rows=((200, 1), (130, 70)), page_size=128),
    "window": Case(rows=((90, 1), (70, 70), (5, 1), (64, 9)), window=24),
    "window of one": Case(rows=((90, 1), (70, 70)), window=1),
    "window longer than the row": Case(rows=((30, 1), (20, 20)), window=512),
    "window past several chunks": Case(rows=((900, 1), (800, 150)), window=400, page_size=32),
    "bfloat16": Case(rows=((70, 1), (300, 40), (64, 64)), dtype="bfloat16", head_size=64),
    "bfloat16 window": Case(rows=((70, 1), (300, 40)), dtype="bfloat16", window=50),
    "float16": Case(rows=((70, 1), (40, 40)), dtype="float16"),
    "head 96": Case(rows=((70, 1), (40, 40)), head_size=96),
    "head 256": Case(rows=((70, 1), (40, 40)), head_size=256),
    "soft cap": Case(rows=((70, 1), (40, 40)), soft_cap=2.0),
    "sinks": Case(rows=((70, 1), (40, 40), (1, 1)), has_sinks=True),
    "sinks and a window": Case(rows=((300, 1), (140, 140)), has_sinks=True, window=30),
    "int8 pool": Case(rows=((70, 1), (300, 40)), kv_dtype="int8", page_size=32, head_size=64),
    "int8 pool of a bfloat16 model": Case(
        rows=((70, 1), (300, 40)), dtype="bfloat16", kv_dtype="int8", page_size=32, head_size=64
    ),
    "float8 pool": Case(
        rows=((70, 1), (300, 40)), dtype="bfloat16", kv_dtype="float8_e4m3fn", page_size=32, head_size=64
    ),
    "bfloat16 pool of a float32 model": Case(rows=((70, 1), (300, 40)), kv_dtype="bfloat16"),
}


def make_arrays(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs as float32 arrays; every number that must not be used is NaN.

    That is: pages of no row, slots past a row's length, and the slots this call writes. Unneeded table columns hold
    page 0, which is poisoned too. Padding queries, keys and values are finite: they are computed with, and dropped.
    """
    rng = np.random.default_rng(seed)
    need = [-(-kv_len // case.page_size) for kv_len, _ in case.rows]
    width = max([*need, 1]) + case.spare_columns
    num_pages = case.num_pages or sum(need) + 5
    order = rng.permutation(np.arange(1, num_pages)).astype(np.int32)
    pages = np.full((num_pages, case.num_kv_heads, case.page_size, 2 * case.head_size), np.nan, np.float32)
    table, used = np.zeros((len(case.rows), width), np.int32), 0
    for row, (kv_len, q_len) in enumerate(case.rows):
        table[row, : need[row]] = order[used : used + need[row]]
        used += need[row]
        for position in range(kv_len - q_len):
            page, slot = table[row, position // case.page_size], position % case.page_size
            pages[page, :, slot] = rng.standard_normal((case.num_kv_heads, 2 * case.head_size))
    tokens = case.num_tokens

    def normal(heads: int) -> np.ndarray:
        return rng.standard_normal((tokens, heads, case.head_size), dtype=np.float32)

    arrays = {
        "q_tnh": normal(case.num_heads),
        "k_tkh": normal(case.num_kv_heads),
        "v_tkh": normal(case.num_kv_heads),
        "pages_pkbd": pages,
        "table_sm": table,
        "q_start_s": np.cumsum([0, *(q for _, q in case.rows)]).astype(np.int32),
        "kv_len_s": np.array([kv_len for kv_len, _ in case.rows], np.int32),
    }
    if case.has_sinks:
        arrays["sinks_n"] = rng.standard_normal(case.num_heads, dtype=np.float32)
    if case.kv_dtype == "int8":
        arrays["kv_scale_2k"] = rng.uniform(0.03, 0.05, (2, case.num_kv_heads)).astype(np.float32)
        # An int8 has no nan; the largest value, far from the others, is as good.
        arrays["pages_pkbd"] = np.where(np.isnan(pages), 127.0, np.round(pages / 0.04))
    elif case.kv_dtype == "float8_e4m3fn":
        arrays["kv_scale_2k"] = rng.uniform(0.5, 1.0, (2, case.num_kv_heads)).astype(np.float32)
    return arrays


_TYPES = (
    ("float32", None),
    ("bfloat16", None),
    ("bfloat16", "int8"),
    ("bfloat16", "float8_e4m3fn"),
    ("float32", "bfloat16"),
    ("float32", "int8"),
)
_HEADS = ((4, 2), (3, 1), (2, 2), (7, 1), (8, 4))  # query and KV heads
_RAGGED_ROWS, _RAGGED_TOKENS, _RAGGED_LENGTH = 5, 40, 256


def ragged_moulds() -> dict[str, Case]:
    """Cases without rows: every head size with every page size, and with each all else that a call can have, in turn."""
    moulds = {}
    for index, (head_size, page_size) in enumerate(itertools.product((64, 80, 96, 128, 256), (16, 32, 64, 128))):
        dtype, kv_dtype = _TYPES[index % len(_TYPES)]
        num_heads, num_kv_heads = _HEADS[index * 2 % len(_HEADS)]
        mould = Case(
            rows=(),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            page_size=page_size,
            dtype=dtype,
            kv_dtype=None if page_size == 16 and kv_dtype != "bfloat16" else kv_dtype,  # narrow ones need larger pages
            window=(None, 33, None, 1, 150, None, 64)[index % 7],
            soft_cap=3.0 if index % 3 == 1 else None,
            has_sinks=index % 4 == 2,
        )
        moulds[f"head {head_size}, page {page_size}, {dtype} over {mould.kv_dtype or dtype}"] = mould
    return moulds


def ragged(mould: Case, seed: int, *, only_decodes: bool = False) -> Case:
    """A mould with random rows, most of them extreme: empty, one token, exactly full pages, one more, the longest there is.

    All draws of a mould have arrays of the same shapes, so one compiled program runs them.
    """
    rng = np.random.default_rng(seed)
    page_size, left, rows = mould.page_size, _RAGGED_TOKENS, []
    for row in range(_RAGGED_ROWS):
        full = page_size * int(rng.integers(1, _RAGGED_LENGTH // page_size + 1))
        lengths = (0, 1, full, min(full + 1, _RAGGED_LENGTH), _RAGGED_LENGTH, int(rng.integers(1, _RAGGED_LENGTH + 1)))
        length = int(rng.choice(lengths[1:] if row == 0 else lengths))
        queries = min(length, left, 1 if only_decodes or rng.random() < 0.4 else _RAGGED_TOKENS)
        if queries > 1 and rng.random() < 0.5:
            queries = int(rng.integers(1, queries + 1))
        rows.append((length if queries else 0, queries))
        left -= queries
    rng.shuffle(rows)
    width = _RAGGED_LENGTH // page_size
    return dataclasses.replace(
        mould,
        rows=tuple((int(length), int(queries)) for length, queries in rows),
        padding=(_RAGGED_ROWS if only_decodes else _RAGGED_TOKENS) - sum(queries for _, queries in rows),
        spare_columns=width - max(-(-length // page_size) for length, _ in rows),
        num_pages=_RAGGED_ROWS * width + 1,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Attention of a real model."""

    num_heads: int
    num_kv_heads: int
    head_size: int = 128
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False


MODELS = {
    "llama-3-8b": ModelShape(num_heads=32, num_kv_heads=8),
    "llama-3-70b": ModelShape(num_heads=64, num_kv_heads=8),
    "llama-3-70b-tp8": ModelShape(num_heads=8, num_kv_heads=1),
    "qwen3-0.6b": ModelShape(num_heads=16, num_kv_heads=8),
    "qwen3-4b": ModelShape(num_heads=32, num_kv_heads=8),
    "qwen3-32b": ModelShape(num_heads=64, num_kv_heads=8),
    "mistral": ModelShape(num_heads=32, num_kv_heads=8, window=4096),
    "llama-3.2-1b": ModelShape(num_heads=32, num_kv_heads=8, head_size=64),
    "llama-2-7b": ModelShape(num_heads=32, num_kv_heads=32),
    "gemma-2": ModelShape(num_heads=8, num_kv_heads=4, head_size=256, window=4096, soft_cap=50.0),
    "gpt-oss": ModelShape(num_heads=64, num_kv_heads=8, head_size=64, window=128, has_sinks=True),
}


def shapes_of(
    model: ModelShape,
    *,
    num_tokens: int,
    num_rows: int,
    num_pages: int = 4093,
    page_size: int = 32,
    table_width: int = 128,
    dtype: Any = jnp.bfloat16,
    kv_dtype: Any = None,
    pool_head_size: int | None = None,
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
    """Arrays, as shapes, and static options of a call. The pool may be wider than its heads."""
    shape, kv_dtype = jax.ShapeDtypeStruct, jnp.dtype(kv_dtype or dtype)
    arrays = {
        "q_tnh": shape((num_tokens, model.num_heads, model.head_size), dtype),
        "k_tkh": shape((num_tokens, model.num_kv_heads, model.head_size), dtype),
        "v_tkh": shape((num_tokens, model.num_kv_heads, model.head_size), dtype),
        "pages_pkbd": shape(
            (num_pages, model.num_kv_heads, page_size, 2 * (pool_head_size or model.head_size)), kv_dtype
        ),
        "table_sm": shape((num_rows, table_width), jnp.int32),
        "q_start_s": shape((num_rows + 1,), jnp.int32),
        "kv_len_s": shape((num_rows,), jnp.int32),
    }
    if model.has_sinks:
        arrays["sinks_n"] = shape((model.num_heads,), jnp.float32)
    if kv_dtype.itemsize == 1:
        arrays["kv_scale_2k"] = shape((2, model.num_kv_heads), jnp.float32)
    options = {"scale": model.head_size**-0.5, "window": model.window, "soft_cap": model.soft_cap}
    return arrays, options | {"max_q_len": 1 if num_tokens == num_rows else None}
