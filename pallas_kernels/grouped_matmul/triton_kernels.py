"""The kernel that `triton.py` launches, in Triton: it can be compiled and interpreted without JAX.

Letters: r rows of a tile, c columns of the result that a program makes, i numbers along the sum.
`no_type_check` keeps the import hook of jaxtyping away, which would put a function of its own in its place.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def multiply(x_mi, w_xoi, group_j, row_j, end_j, out_mo, shape: tl.constexpr):
    """Some columns of one tile's products."""
    tile = tl.program_id(0)
    group = tl.load(group_j + tile)
    if group >= shape.num_groups:
        return
    at_r = tl.load(row_j + tile) + tl.arange(0, shape.rows)
    at_c = tl.program_id(1) * shape.columns + tl.arange(0, shape.columns)
    at_i = tl.arange(0, shape.chunk)
    is_row_r, is_column_c = at_r < tl.load(end_j + tile), at_c < shape.width
    x_ri = x_mi + at_r.to(tl.int64)[:, None] * shape.size + at_i[None, :]
    w_ci = w_xoi + group.to(tl.int64) * shape.width * shape.size + at_c[:, None] * shape.size + at_i[None, :]
    sum_rc = tl.zeros((shape.rows, shape.columns), tl.float32)
    for begin in range(0, shape.size, shape.chunk):
        is_real_i = at_i < shape.size - begin
        left_ri = tl.load(x_ri + begin, mask=is_row_r[:, None] & is_real_i[None, :], other=0.0)
        right_ci = tl.load(w_ci + begin, mask=is_column_c[:, None] & is_real_i[None, :], other=0.0)
        if shape.is_widened:
            left_ri, right_ci = left_ri.to(tl.float32), right_ci.to(tl.float32)
        sum_rc = tl.dot(left_ri, tl.trans(right_ci), sum_rc, input_precision="ieee")
    out_rc = out_mo + at_r.to(tl.int64)[:, None] * shape.width + at_c[None, :]
    tl.store(out_rc, sum_rc.to(out_mo.dtype.element_ty), mask=is_row_r[:, None] & is_column_c[None, :])
