"""The kernels that `triton.py` launches, in Triton: they can be compiled and interpreted without JAX.

`shape` is `triton.Shape`, fixed when a kernel is compiled. What a launch updates in place is passed twice, as input and as
output; both are one buffer. Letters: r the rows of a call and c the keys of a chunk, padded to powers of two; q the query
rows of one KV head, token-major with the group's heads of a token side by side; h a head, padded to a power of two.
Scores are kept in units of log2, because the hardware has powers of two only.

`no_type_check` keeps the import hook of jaxtyping away, which would put a function of its own in place of each.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from typing import no_type_check

import triton
import triton.language as tl

_MASKED = tl.constexpr(-1e30)  # finite, so that a fully masked chunk yields exp(0) * 0 rather than nan
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check
def write_pages(
    new_tkd,
    table_sm,
    q_start_s,
    kv_len_s,
    _pages,
    num_rows,
    table_width,
    pages_pkbd,
    shape: tl.constexpr,
):
    """Copy one token's keys and values, of some heads, into its slot. Padding tokens have none."""
    token = tl.program_id(0)
    at_r = tl.arange(0, shape.rows)
    q_end_r = tl.load(q_start_s + 1 + at_r, mask=at_r < num_rows, other=2147483647)
    row = tl.sum((q_end_r <= token).to(tl.int32), 0)
    if row >= num_rows:
        return
    position = tl.load(kv_len_s + row) - (tl.load(q_start_s + 1 + row) - token)
    page = tl.load(table_sm + row * table_width + position // shape.page_size).to(tl.int64)
    at_k = tl.program_id(1) * shape.heads + tl.arange(0, shape.heads)
    at_d = tl.arange(0, 2 * shape.width)
    is_real_kd = (at_k < shape.num_kv_heads)[:, None] & (at_d < shape.slot_stride)[None, :]
    source_kd = at_k[:, None] * shape.slot_stride + at_d[None, :]
    target_kd = at_k[:, None] * shape.head_stride + at_d[None, :]
    new_kd = tl.load(new_tkd + token * shape.token_stride + source_kd, mask=is_real_kd)
    slot = pages_pkbd + page * shape.page_stride + (position % shape.page_size) * shape.slot_stride
    tl.store(slot + target_kd, new_kd, mask=is_real_kd)


@triton.jit
@no_type_check
def attend_tiles(
    q_tnh,
    pages_pkbd,
    table_sm,
    q_start_s,
    kv_len_s,
    sinks_n,
    kv_scale_2k,
    _out,
    _lse,
    num_rows,
    table_width,
    out_tnh,
    lse_tn,
    shape: tl.constexpr,
):
    """One KV head of a tile: some tokens of a row that has several. Tiles with the most keys come first: a row's last."""
    kv_head = tl.program_id(1)
    q_len_r, _ = _lengths(q_start_s, kv_len_s, num_rows, shape)
    count_r = tl.where(q_len_r > 1, (q_len_r + shape.tokens - 1) // shape.tokens, 0)
    row, index = _find(count_r, tl.num_programs(0) - 1 - tl.program_id(0))
    if row >= num_rows:
        return
    token = tl.load(q_start_s + row) + index * shape.tokens
    num_tokens = tl.minimum(shape.tokens, tl.load(q_start_s + row + 1) - token)
    position = tl.load(kv_len_s + row) - (tl.load(q_start_s + row + 1) - token)
    num_keys = position + num_tokens
    begin = _first_key(position, shape)
    # Chunks in [low, high) are seen whole by all queries of the tile.
    high = (position + 1) // shape.keys * shape.keys
    low = begin
    if shape.window > 0:
        low = tl.maximum(num_keys - shape.window + shape.keys - 1, 0) // shape.keys * shape.keys
        low = tl.minimum(low, (num_keys + shape.keys - 1) // shape.keys * shape.keys)
    high = tl.maximum(low, high)

    inner, factor, value_scale = _factors(kv_scale_2k, kv_head, shape)
    token_q, head_q = _queries(kv_head, shape)
    q_qh = _load_queries(q_tnh, token, num_tokens, token_q, head_q, shape)
    acc_qh, top_q, total_q = _empty(sinks_n, head_q, 0, shape)
    table = table_sm + row * table_width
    pages = pages_pkbd + kv_head * shape.head_stride
    position_q = position + token_q
    if shape.window > 0:
        acc_qh, top_q, total_q = _absorb(
            acc_qh, top_q, total_q, q_qh, table, pages, position_q, begin, low, num_keys, inner, factor, True, shape
        )
    acc_qh, top_q, total_q = _absorb(
        acc_qh, top_q, total_q, q_qh, table, pages, position_q, low, high, num_keys, inner, factor, False, shape
    )
    acc_qh, top_q, total_q = _absorb(
        acc_qh, top_q, total_q, q_qh, table, pages, position_q, high, num_keys, num_keys, inner, factor, True, shape
    )
    is_real_q = token_q < num_tokens
    place_q = (token + token_q) * shape.num_heads + head_q
    _store(out_tnh, place_q, is_real_q, acc_qh * (value_scale / total_q)[:, None], shape)
    if shape.wants_lse:
        tl.store(lse_tn + place_q, (top_q + tl.log2(total_q)) * _LN2, mask=is_real_q)


@triton.jit
@no_type_check
def attend_decodes(
    q_tnh,
    pages_pkbd,
    table_sm,
    q_start_s,
    kv_len_s,
    sinks_n,
    kv_scale_2k,
    _out,
    _lse,
    num_rows,
    table_width,
    out_tnh,
    lse_tn,
    part_xnh,
    part_xn,
    shape: tl.constexpr,
):
    """One KV head of a split: a part of the context of a row with one query. Parts of a row with several go to `part_*`."""
    kv_head, split = tl.program_id(0), tl.program_id(1)
    span_r, size = _splits(q_start_s, kv_len_s, num_rows, shape)
    row, index = _find((span_r + size - 1) // size, split)
    if row >= num_rows:
        return
    token = tl.load(q_start_s + row)
    num_keys = tl.load(kv_len_s + row)
    first = _first_key(num_keys - 1, shape)
    begin = first + index * size
    end = tl.minimum(begin + size, num_keys)

    inner, factor, value_scale = _factors(kv_scale_2k, kv_head, shape)
    token_q, head_q = _queries(kv_head, shape)
    q_qh = _load_queries(q_tnh, token, 1, token_q, head_q, shape)
    acc_qh, top_q, total_q = _empty(sinks_n, head_q, index, shape)
    table = table_sm + row * table_width
    pages = pages_pkbd + kv_head * shape.head_stride
    position_q = num_keys - 1 + token_q
    acc_qh, top_q, total_q = _absorb(
        acc_qh, top_q, total_q, q_qh, table, pages, position_q, begin, end, num_keys, inner, factor, True, shape
    )
    is_real_q = token_q < 1
    out_qh = acc_qh * (value_scale / total_q)[:, None]
    lse_q = top_q + tl.log2(total_q)
    if num_keys - first <= size:
        place_q = token * shape.num_heads + head_q
        _store(out_tnh, place_q, is_real_q, out_qh, shape)
        if shape.wants_lse:
            tl.store(lse_tn + place_q, lse_q * _LN2, mask=is_real_q)
    else:
        place_q = split * shape.num_heads + head_q
        _store(part_xnh, place_q, is_real_q, out_qh, shape)
        tl.store(part_xn + place_q, lse_q, mask=is_real_q)


@triton.jit
@no_type_check
def merge_splits(
    part_xnh,
    part_xn,
    q_start_s,
    kv_len_s,
    _out,
    _lse,
    num_rows,
    out_tnh,
    lse_tn,
    shape: tl.constexpr,
):
    """One query head of a row whose context was split: the mean of its parts, weighted by their softmax denominators."""
    row, head = tl.program_id(0), tl.program_id(1)
    span_r, size = _splits(q_start_s, kv_len_s, num_rows, shape)
    count_r = (span_r + size - 1) // size
    at_r = tl.arange(0, shape.rows)
    count = tl.sum(tl.where(at_r == row, count_r, 0), 0)
    if count <= 1:
        return
    first = tl.sum(tl.where(at_r < row, count_r, 0), 0)
    at_x = tl.arange(0, shape.splits_padded)
    lse_x = tl.load(part_xn + (first + at_x) * shape.num_heads + head, mask=at_x < count, other=_MASKED)
    top = tl.max(lse_x, 0)
    total = tl.sum(tl.exp2(lse_x - top), 0)
    at_h = tl.arange(0, shape.width)
    acc_h = tl.zeros([shape.width], tl.float32)
    for begin in tl.range(0, count, shape.merged):
        at_y = begin + tl.arange(0, shape.merged)
        place_y = (first + at_y) * shape.num_heads + head
        weight_y = tl.exp2(tl.load(part_xn + place_y, mask=at_y < count, other=_MASKED) - top)
        is_real_yh = (at_y < count)[:, None] & (at_h < shape.head_size)[None, :]
        part_yh = tl.load(part_xnh + place_y[:, None] * shape.head_size + at_h[None, :], mask=is_real_yh, other=0.0)
        acc_h += tl.sum(part_yh * weight_y[:, None], 0)
    place = tl.load(q_start_s + row) * shape.num_heads + head
    out_h = (acc_h / total).to(out_tnh.dtype.element_ty)
    tl.store(out_tnh + place * shape.head_size + at_h, out_h, mask=at_h < shape.head_size)
    if shape.wants_lse:
        tl.store(lse_tn + place, (top + tl.log2(total)) * _LN2)


@triton.jit
@no_type_check
def _lengths(q_start_s, kv_len_s, num_rows, shape: tl.constexpr):
    """Queries and tokens of each row; none of what is no row."""
    at_r = tl.arange(0, shape.rows)
    is_row_r = at_r < num_rows
    q_begin_r = tl.load(q_start_s + at_r, mask=is_row_r, other=0)
    q_end_r = tl.load(q_start_s + 1 + at_r, mask=is_row_r, other=0)
    return q_end_r - q_begin_r, tl.load(kv_len_s + at_r, mask=is_row_r, other=0)


@triton.jit
@no_type_check
def _find(count_r, item):
    """Row of an item of a list in which row r has count_r items, and its place among those. Past the end: no real row."""
    end_r = tl.cumsum(count_r, 0)
    is_before_r = end_r <= item
    row = tl.sum(is_before_r.to(tl.int32), 0)
    return row, item - tl.sum(tl.where(is_before_r, count_r, 0), 0)


@triton.jit
@no_type_check
def _splits(q_start_s, kv_len_s, num_rows, shape: tl.constexpr):
    """Keys that each decode row visits, none for other rows; and keys in a split: all rows' keys over the wanted number."""
    q_len_r, kv_len_r = _lengths(q_start_s, kv_len_s, num_rows, shape)
    span_r = tl.where(q_len_r == 1, kv_len_r - _first_key(kv_len_r - 1, shape), 0)
    fair = (tl.sum(span_r, 0) + shape.splits - 1) // shape.splits
    return span_r, tl.maximum((fair + shape.keys - 1) // shape.keys * shape.keys, shape.least)


@triton.jit
@no_type_check
def _first_key(position, shape: tl.constexpr):
    """Start of the first chunk that a query at a position sees a key of."""
    first = position * 0
    if shape.window > 0:
        first = tl.maximum(position - shape.window + 1, 0) // shape.keys * shape.keys
    return first


@triton.jit
@no_type_check
def _factors(kv_scale_2k, kv_head, shape: tl.constexpr):
    """What products are multiplied with before and after the soft cap (before: 1 where there is none), and values."""
    key_scale = 1.0
    value_scale = 1.0
    if shape.has_scale:
        key_scale = tl.load(kv_scale_2k + kv_head)
        value_scale = tl.load(kv_scale_2k + shape.num_kv_heads + kv_head)
    inner = 1.0
    factor = key_scale * (shape.scale * _LOG2E)
    if shape.soft_cap > 0:
        inner = key_scale * (shape.scale / shape.soft_cap)
        factor = shape.soft_cap * _LOG2E
    return inner, factor, value_scale


@triton.jit
@no_type_check
def _queries(kv_head, shape: tl.constexpr):
    """Token of each query row, counted from the tile's first, and head."""
    at_q = tl.arange(0, shape.queries)
    return at_q // shape.group, kv_head * shape.group + at_q % shape.group


@triton.jit
@no_type_check
def _load_queries(q_tnh, token, num_tokens, token_q, head_q, shape: tl.constexpr):
    at_h = tl.arange(0, shape.width)
    place_q = ((token + token_q) * shape.num_heads + head_q) * shape.head_size
    is_real_qh = (token_q < num_tokens)[:, None] & (at_h < shape.head_size)[None, :]
    return _as_factor(tl.load(q_tnh + place_q[:, None] + at_h[None, :], mask=is_real_qh, other=0.0), shape)


@triton.jit
@no_type_check
def _empty(sinks_n, head_q, index, shape: tl.constexpr):
    """Running sums, maximum and sum of weights before any key; the first part of a row has absorbed the sink."""
    top_q = tl.full([shape.queries], _MASKED, tl.float32)
    total_q = tl.zeros([shape.queries], tl.float32)
    if shape.has_sinks:
        # Query rows past the last head are never stored; any sink will do for them.
        sink_q = tl.load(sinks_n + tl.minimum(head_q, shape.num_heads - 1)) * _LOG2E
        top_q = tl.where(index == 0, sink_q, top_q)
        total_q += 1.0  # in other parts the first key shrinks this to nothing
    return tl.zeros([shape.queries, shape.width], tl.float32), top_q, total_q


@triton.jit
@no_type_check
def _absorb(
    acc_qh,
    top_q,
    total_q,
    q_qh,
    table,
    pages,
    position_q,
    begin,
    end,
    num_keys,
    inner,
    factor,
    is_masked: tl.constexpr,
    shape: tl.constexpr,
):
    """Merge the keys in [begin, end) into the running softmax, a chunk at a time.

    `begin` is a multiple of the chunk. Without a mask all keys are real and seen by every query.
    """
    at_c = tl.arange(0, shape.keys)
    at_h = tl.arange(0, shape.width)
    in_head_h = at_h < shape.head_size
    for key in tl.range(begin, end, shape.keys):
        key_c = key + at_c
        is_real_c = key_c < num_keys
        if shape.is_chunk_in_page:
            page = tl.load(table + key // shape.page_size).to(tl.int64)
            slot_c = pages + page * shape.page_stride + (key % shape.page_size + at_c) * shape.slot_stride
        else:
            if is_masked:
                page_c = tl.load(table + key_c // shape.page_size, mask=is_real_c, other=0).to(tl.int64)
            else:
                page_c = tl.load(table + key_c // shape.page_size).to(tl.int64)
            slot_c = pages + page_c * shape.page_stride + (key_c % shape.page_size) * shape.slot_stride
        k_ch = slot_c[:, None] + at_h[None, :]
        v_ch = k_ch + shape.head_size
        if is_masked:
            is_real_ch = is_real_c[:, None] & in_head_h[None, :]
            k_ch = tl.load(k_ch, mask=is_real_ch, other=0)
            v_ch = tl.load(v_ch, mask=is_real_ch, other=0)
        elif shape.is_head_padded:
            k_ch = tl.load(k_ch, mask=in_head_h[None, :], other=0)
            v_ch = tl.load(v_ch, mask=in_head_h[None, :], other=0)
        else:
            k_ch = tl.load(k_ch)
            v_ch = tl.load(v_ch)
        score_qc = tl.dot(q_qh, tl.trans(_stored(k_ch, shape)), input_precision="ieee")
        if shape.soft_cap > 0:
            score_qc = _tanh(score_qc * inner)
        if is_masked:
            is_seen_qc = key_c[None, :] <= position_q[:, None]
            if shape.window > 0:
                is_seen_qc = is_seen_qc & (key_c[None, :] > position_q[:, None] - shape.window)
            score_qc = tl.where(is_seen_qc, score_qc, _MASKED)
        before_q = top_q
        top_q = tl.maximum(before_q, tl.max(score_qc, 1) * factor)
        weight_qc = tl.exp2(score_qc * factor - top_q[:, None])
        shrink_q = tl.exp2(before_q - top_q)
        total_q = total_q * shrink_q + tl.sum(weight_qc, 1)
        acc_qh = acc_qh * shrink_q[:, None]
        acc_qh = tl.dot(_as_factor(weight_qc, shape), _stored(v_ch, shape), acc_qh, input_precision="ieee")
    return acc_qh, top_q, total_q


@triton.jit
@no_type_check
def _tanh(x):
    small = tl.exp2(tl.abs(x) * (-2.0 * _LOG2E))
    return tl.where(x < 0, small - 1.0, 1.0 - small) / (1.0 + small)


@triton.jit
@no_type_check
def _as_factor(x, shape: tl.constexpr):
    """Numbers in the type of the products' factors."""
    if shape.dot_dtype == "bfloat16":
        y = x.to(tl.bfloat16)
    elif shape.dot_dtype == "float16":
        y = x.to(tl.float16)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
@no_type_check
def _stored(x, shape: tl.constexpr):
    """Numbers of the pool, or their bits, in the type of the products' factors."""
    if shape.kv_dtype == "bfloat16":
        y = x.to(tl.bfloat16, bitcast=True)
    elif shape.kv_dtype == "float16":
        y = x.to(tl.float16, bitcast=True)
    elif shape.kv_dtype == "int8":
        y = x.to(tl.int8, bitcast=True).to(tl.float32)
    elif shape.kv_dtype == "float8_e5m2":
        y = x.to(tl.float8e5, bitcast=True)
    elif shape.kv_dtype == "float8_e4m3fn":
        if shape.has_float8:
            y = x.to(tl.float8e4nv, bitcast=True)
        else:
            # The same bits in a float32 are too small by its larger exponent bias, also where the number is subnormal.
            bits = x.to(tl.int32)
            y = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True) * 2.0**120
    else:
        y = x.to(tl.float32, bitcast=True)
    return _as_factor(y, shape)


@triton.jit
@no_type_check
def _store(out_xh, place_q, is_real_q, value_qh, shape: tl.constexpr):
    at_h = tl.arange(0, shape.width)
    is_real_qh = is_real_q[:, None] & (at_h < shape.head_size)[None, :]
    out_qh = out_xh + place_q[:, None] * shape.head_size + at_h[None, :]
    tl.store(out_qh, value_qh.to(out_xh.dtype.element_ty), mask=is_real_qh)
