"""Debug checks of a call's values. Shapes and options are always checked, in `op.py`; values need them on the host."""

import jax
import numpy as np


def wanted() -> bool:
    """Whether JAX's own debug checks are on: `JAX_ENABLE_CHECKS=1` or `jax.config.update("jax_enable_checks", True)`."""
    return bool(jax.config.jax_enable_checks)  # pyright: ignore[reportAttributeAccessIssue]


def check_rows(table_sm, q_start_s, kv_len_s, *, num_tokens: int, num_pages: int, page_size: int) -> None:
    """Raise ValueError for the first array that would make a kernel read or write where it must not.

    Args:
      table_sm, q_start_s, kv_len_s: as in `op.ragged_paged_attention`, with values (not traced).
      num_tokens: tokens of the call, padding included.
      num_pages, page_size: of the pool.
    """
    table_sm, q_start_s, kv_len_s = (np.asarray(x, np.int64) for x in (table_sm, q_start_s, kv_len_s))
    q_len_s = np.diff(q_start_s)
    if q_start_s[0] < 0 or q_start_s[-1] > num_tokens:
        raise ValueError(f"q_start_s goes from {q_start_s[0]} to {q_start_s[-1]}, but there are {num_tokens} tokens")
    if (row := _first(q_len_s < 0)) is not None:
        raise ValueError(
            f"q_start_s must ascend: row {row} begins at {q_start_s[row]} and ends at {q_start_s[row + 1]}"
        )
    if (row := _first(kv_len_s < q_len_s)) is not None:
        raise ValueError(f"kv_len_s: row {row} has {kv_len_s[row]} tokens, fewer than its {q_len_s[row]} queries")
    width = table_sm.shape[1] * page_size
    if (row := _first(kv_len_s > width)) is not None:
        raise ValueError(f"kv_len_s: row {row} has {kv_len_s[row]} tokens, but its part of table_sm holds {width}")
    is_used_sm = np.arange(table_sm.shape[1])[None, :] * page_size < kv_len_s[:, None]
    is_outside_sm = is_used_sm & ((table_sm < 0) | (table_sm >= num_pages))
    if (row := _first(is_outside_sm.any(axis=1))) is not None:
        column = _first(is_outside_sm[row])
        raise ValueError(
            f"table_sm: row {row}, column {column} is page {table_sm[row, column]}, but the pool has {num_pages} pages"
        )


def _first(is_wrong: np.ndarray) -> int | None:
    return int(np.argmax(is_wrong)) if is_wrong.any() else None
