"""Debug checks: wrong values are named before anything is launched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.ragged_paged_attention.cases import CASES, make_arrays
from jaxserve.pallas_kernels.ragged_paged_attention.checks import check_rows
from jaxserve.pallas_kernels.ragged_paged_attention.op import ragged_paged_attention

CASE = CASES["mixed"]  # rows of 33, 50, 64, 17 and 90 tokens, with 1, 20, 64, 1 and 2 queries; pages of 16
PAGES = make_arrays(CASE)["pages_pkbd"].shape[0]


def changed(name: str, index: tuple[int, ...] | int, value: int) -> dict[str, np.ndarray]:
    array = make_arrays(CASE)[name]
    array[index] = value
    return {name: array}


WRONG = {
    f"table_sm: row 1, column 3 is page {PAGES}, but the pool has {PAGES} pages": changed("table_sm", (1, 3), PAGES),
    f"table_sm: row 4, column 0 is page -1, but the pool has {PAGES} pages": changed("table_sm", (4, 0), -1),
    "kv_len_s: row 1 has 19 tokens, fewer than its 20 queries": changed("kv_len_s", 1, 19),
    "kv_len_s: row 0 has 129 tokens, but its part of table_sm holds 128": changed("kv_len_s", 0, 129),
    "q_start_s must ascend: row 2 begins at 21 and ends at 20": changed("q_start_s", 3, 20),
    "q_start_s goes from 0 to 92, but there are 91 tokens": changed("q_start_s", -1, CASE.num_tokens + 1),
    "q_start_s goes from -1 to 88, but there are 91 tokens": changed("q_start_s", 0, -1),
}


def call(arrays: dict[str, np.ndarray]):
    return ragged_paged_attention(**{name: jnp.asarray(x) for name, x in arrays.items()}, scale=0.3, impl="xla")


@pytest.mark.parametrize("message", WRONG)
def test_wrong_rows_are_named_when_checks_are_on(message: str):
    with jax.enable_checks(True), pytest.raises(ValueError, match=f"^{message}$"):
        call(make_arrays(CASE) | WRONG[message])


def test_wrong_rows_inside_of_a_jitted_function_cannot_be_seen():
    arrays = make_arrays(CASE) | changed("table_sm", (1, 3), PAGES)
    with jax.enable_checks(True):
        jax.eval_shape(call, arrays)


def test_nothing_is_looked_at_when_checks_are_off():
    jax.block_until_ready(call(make_arrays(CASE) | changed("table_sm", (1, 3), PAGES)))


@pytest.mark.parametrize("name", CASES)
def test_right_rows_pass(name: str):
    case, arrays = CASES[name], make_arrays(CASES[name])
    arrays["table_sm"] = np.where(  # what is not needed may hold anything
        np.arange(arrays["table_sm"].shape[1]) * case.page_size < arrays["kv_len_s"][:, None], arrays["table_sm"], -7
    )
    check_rows(
        *(arrays[name] for name in ("table_sm", "q_start_s", "kv_len_s")),
        num_tokens=case.num_tokens,
        num_pages=arrays["pages_pkbd"].shape[0],
        page_size=case.page_size,
    )
