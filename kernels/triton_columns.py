"""Portable Triton kernels for columns: single keys chosen for whole groups of query blocks.

The keys and values of columns lie gathered in buffers of their own. A column counts for a row unless its
tile is chosen there, and for a query if it is visible; both are looked up per element. The backward splits
long sums over rows into a fixed number of parts that are added in order: deterministic, like the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bound import BoundPlan
from .triton_backward import add_by_key, add_to, normaliser, scores_by_query
from .triton_forward import (
    COUNTS,
    LOG2E,
    accumulate,
    check,
    intervals,
    launch,
    merge,
    options,
    query_intervals,
    query_program,
    rows_of,
    square,
    unseen,
    visible,
)

_PROGRAMS = 512  # column tiles are split by rows until there are about so many programs
_SCAN = tl.constexpr(128)  # rows looked at together when a column tile searches for its queries


def forward_columns(q, ck, cv, bound: BoundPlan, out, lse, scale: float) -> None:
    """Continues `out` and `lse` with the columns; a column inside a chosen tile is skipped."""
    check(scale, (q, ck, cv), (out, lse))
    if bound.columns.shape[3] == 0:
        return
    chosen, meta = options("forward_columns", q, bound)
    tensors = (q.contiguous(), ck.contiguous(), cv.contiguous(), out, lse)
    launch(
        _forward_columns,
        q.shape[0] * q.shape[1] * bound.rows * (bound.block_size // chosen.queries),
        q,
        (*tensors, *lists_of(bound), scale * LOG2E.value, *_counts(q, ck, bound)),
        GROUPED=bound.column_group is not None,
        **meta,
    )


def backward_columns(q, ck, cv, dout, lse, delta, bound: BoundPlan, dq, dck, dcv, scale: float) -> None:
    """Adds the gradients of the columns to dq and to dck, dcv (shaped like ck)."""
    check(scale, (q, ck, cv), (dq, dck, dcv))
    batch, heads, _, _ = q.shape
    kv_heads, groups, count = ck.shape[1:4]
    if count == 0:
        return
    tensors = [x.contiguous() for x in (q, ck, cv, dout, lse, delta)]
    lists = (*lists_of(bound), scale * LOG2E.value, scale, *_counts(q, ck, bound))
    grouped = bound.column_group is not None
    chosen, meta = options("dq_columns", q, bound)
    launch(
        _dq_columns,
        batch * heads * bound.rows * (bound.block_size // chosen.queries),
        q,
        (*tensors, dq, *lists),
        GROUPED=grouped,
        **meta,
    )
    chosen, meta = options("dkv_columns", q, bound)
    programs = batch * kv_heads * groups * triton.cdiv(count, chosen.keys)
    splits = min(triton.cdiv(_PROGRAMS, programs), triton.cdiv(bound.rows, 4))
    targets, stride = (dck, dcv), 0
    if splits > 1:  # small: at most _PROGRAMS + programs tiles
        targets = [x.new_zeros(splits, *x.shape) for x in (dck, dcv)]
        stride = dck.numel()
    launch(
        _dkv_columns,
        programs * splits,
        q,
        (*tensors, *targets, *lists, bound.plan.geometry.num_tokens, splits, stride),
        SHARE=heads // kv_heads,
        GROUPED=grouped,
        **meta,
    )
    if splits > 1:
        for total, parts in zip((dck, dcv), targets, strict=True):
            total.add_(parts.sum(0))


def lists_of(bound: BoundPlan) -> tuple[Tensor, ...]:
    """tiles, columns, column_group or a stand-in, the range of each row, and the visible intervals."""
    group = bound.column_begin if bound.column_group is None else bound.column_group  # or a stand-in
    ranges = (bound.column_begin, bound.column_end)
    return bound.tiles, bound.columns, group, *ranges, *intervals(bound)


def _counts(q: Tensor, ck: Tensor, bound: BoundPlan) -> tuple[int, ...]:
    """rows, groups, count, words, heads, kv_heads, mask_heads, column_heads."""
    groups, count = bound.columns.shape[2:]
    heads = (q.shape[1], ck.shape[1], bound.mask_heads, bound.columns.shape[1])
    return bound.rows, groups, count, bound.tiles.shape[3], *heads


@triton.jit
def _some_rows_of(
    pointer, places, last, COUNT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr
):
    """The first `last` of COUNT consecutive rows from `pointer` on, zeros for the others."""
    kept = (tl.arange(0, COUNT) < last)[:, None]
    if DIM != WIDTH:
        kept = kept & (tl.arange(0, WIDTH) < DIM)[None, :]
    return tl.load(pointer + places, mask=kept, other=0.0).to(TYPE)


@triton.jit
def outside_tiles(tiles, position, kept, BLOCK: tl.constexpr):
    """Whether the tile of each key position is absent from a row of the bitmask; False where not kept."""
    block = position // BLOCK
    word = tl.load(tiles + block // 32, mask=kept, other=-1)
    return kept & (((word >> (block % 32)) & 1) == 0)


@triton.jit(do_not_specialize=COUNTS)
def _forward_columns(
    q,
    k,
    v,
    out,
    lse,
    tiles,
    columns,
    column_group,
    column_begin,
    column_end,
    lo,
    hi,
    prefix_lo,
    prefix_hi,
    scale,
    rows,
    groups,
    count,
    words,
    heads,
    kv_heads,
    mask_heads,
    column_heads,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch, head, row, token = query_program(rows, heads, kv_heads, BLOCK, QUERIES)
    column_head = batch * column_heads + head * column_heads // heads
    begin = tl.load(column_begin + column_head * rows + row)
    end = tl.load(column_end + column_head * rows + row)
    if begin >= end:
        return
    group = 0
    if GROUPED:
        group = tl.load(column_group + row)
    offset = (batch * heads + head).to(tl.int64) * rows * BLOCK + token
    key_head = batch * kv_heads + head * kv_heads // heads
    key_offset = (key_head.to(tl.int64) * groups + group) * count * DIM
    k, v = k + key_offset, v + key_offset
    columns = columns + (column_head.to(tl.int64) * groups + group) * count
    mask_head = batch * mask_heads + head * mask_heads // heads
    tiles = tiles + (mask_head.to(tl.int64) * rows + row) * words
    low, high, prefix_low, prefix_high = query_intervals(
        lo, hi, prefix_lo, prefix_hi, batch.to(tl.int64) * rows * BLOCK + token, QUERIES, PREFIX
    )
    query_square, key_square = square(QUERIES, DIM, WIDTH), square(KEYS, DIM, WIDTH)
    queries = rows_of(q + offset * DIM, query_square, DIM, WIDTH, TYPE)
    peak, total, acc = unseen(out.dtype.element_ty, QUERIES, WIDTH)
    for i in range(0, tl.cdiv(end - begin, KEYS)):
        first = begin + i * KEYS
        kept = tl.arange(0, KEYS) < end - first
        position = tl.load(columns + first + tl.arange(0, KEYS), mask=kept, other=0)
        place = first.to(tl.int64) * DIM
        keys = _some_rows_of(k + place, key_square, end - first, KEYS, DIM, WIDTH, TYPE)
        values = _some_rows_of(v + place, key_square, end - first, KEYS, DIM, WIDTH, TYPE)
        kept = outside_tiles(tiles, position, kept, BLOCK)
        seen = visible(position[None, :], low, high, prefix_low, prefix_high, PREFIX) & kept[None, :]
        peak, total, acc = accumulate(queries, keys, values, seen, scale, peak, total, acc, True, PRECISION)
    merge(out + offset * DIM, lse + offset, query_square, peak, total, acc, QUERIES, DIM, WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def _dq_columns(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dq,
    tiles,
    columns,
    column_group,
    column_begin,
    column_end,
    lo,
    hi,
    prefix_lo,
    prefix_hi,
    scale_log2,
    scale,
    rows,
    groups,
    count,
    words,
    heads,
    kv_heads,
    mask_heads,
    column_heads,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch, head, row, token = query_program(rows, heads, kv_heads, BLOCK, QUERIES)
    column_head = batch * column_heads + head * column_heads // heads
    begin = tl.load(column_begin + column_head * rows + row)
    end = tl.load(column_end + column_head * rows + row)
    if begin >= end:
        return
    group = 0
    if GROUPED:
        group = tl.load(column_group + row)
    ACC: tl.constexpr = dq.dtype.element_ty
    offset = (batch * heads + head).to(tl.int64) * rows * BLOCK + token
    key_head = batch * kv_heads + head * kv_heads // heads
    key_offset = (key_head.to(tl.int64) * groups + group) * count * DIM
    k, v = k + key_offset, v + key_offset
    columns = columns + (column_head.to(tl.int64) * groups + group) * count
    mask_head = batch * mask_heads + head * mask_heads // heads
    tiles = tiles + (mask_head.to(tl.int64) * rows + row) * words
    low, high, prefix_low, prefix_high = query_intervals(
        lo, hi, prefix_lo, prefix_hi, batch.to(tl.int64) * rows * BLOCK + token, QUERIES, PREFIX
    )
    query_square, key_square = square(QUERIES, DIM, WIDTH), square(KEYS, DIM, WIDTH)
    queries = rows_of(q + offset * DIM, query_square, DIM, WIDTH, TYPE)
    grads = rows_of(dout + offset * DIM, query_square, DIM, WIDTH, TYPE)
    norm, deltas = normaliser(lse + offset, delta + offset, QUERIES)
    acc = tl.zeros([QUERIES, WIDTH], dtype=ACC)
    for i in range(0, tl.cdiv(end - begin, KEYS)):
        first = begin + i * KEYS
        kept = tl.arange(0, KEYS) < end - first
        position = tl.load(columns + first + tl.arange(0, KEYS), mask=kept, other=0)
        place = first.to(tl.int64) * DIM
        keys = _some_rows_of(k + place, key_square, end - first, KEYS, DIM, WIDTH, TYPE)
        values = _some_rows_of(v + place, key_square, end - first, KEYS, DIM, WIDTH, TYPE)
        kept = outside_tiles(tiles, position, kept, BLOCK)
        seen = visible(position[None, :], low, high, prefix_low, prefix_high, PREFIX) & kept[None, :]
        dscores = scores_by_query(
            queries, keys, values, grads, norm, deltas, seen, scale_log2, True, PRECISION, ACC
        )
        acc = tl.dot(dscores, keys, acc, input_precision=PRECISION, out_dtype=ACC)
    add_to(dq + offset * DIM, query_square, QUERIES, acc * scale, QUERIES, DIM, WIDTH)


@triton.jit
def _rows_that_see(begin, end, column_group, group, first, last, rows, GROUPED: tl.constexpr):
    """Smallest range of rows that holds all rows of a group that may see columns [first, last)."""
    top, bottom = rows, 0
    for start in range(0, rows, _SCAN):
        row = start + tl.arange(0, _SCAN)
        inside = row < rows
        live = inside & (tl.load(begin + row, mask=inside, other=0) < last)
        live = live & (tl.load(end + row, mask=inside, other=0) > first)
        if GROUPED:
            live = live & (tl.load(column_group + row, mask=inside, other=-1) == group)
        top = tl.minimum(top, tl.min(tl.where(live, row, rows)))
        bottom = tl.maximum(bottom, tl.max(tl.where(live, row + 1, 0)))
    return top, bottom


@triton.jit(do_not_specialize=COUNTS)
def _dkv_columns(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    tiles,
    columns,
    column_group,
    column_begin,
    column_end,
    lo,
    hi,
    prefix_lo,
    prefix_hi,
    scale_log2,
    scale,
    rows,
    groups,
    count,
    words,
    heads,
    kv_heads,
    mask_heads,
    column_heads,
    num_tokens,
    splits,
    split_stride,
    SHARE: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    SPLIT: tl.constexpr = BLOCK // QUERIES
    pid = tl.program_id(0)
    split = pid % splits
    rest = pid // splits
    parts = tl.cdiv(count, KEYS)
    first = rest % parts * KEYS
    key_group = rest // parts  # counts over batch, key head, group
    group = key_group % groups
    key_head = key_group // groups
    batch = key_head // kv_heads
    kv_head = key_head % kv_heads
    column_head = batch * column_heads + kv_head * column_heads // kv_heads
    top, bottom = _rows_that_see(
        column_begin + column_head * rows,
        column_end + column_head * rows,
        column_group,
        group,
        first,
        first + KEYS,
        rows,
        GROUPED,
    )
    share = tl.cdiv(tl.maximum(bottom - top, 0), splits)
    top += split * share
    bottom = tl.minimum(bottom, top + share)
    if top >= bottom:
        return
    ACC: tl.constexpr = dk.dtype.element_ty
    tokens = rows.to(tl.int64) * BLOCK
    offset = (batch * heads + kv_head * SHARE).to(tl.int64) * tokens
    key_offset = (key_group.to(tl.int64) * count + first) * DIM
    columns = columns + (column_head.to(tl.int64) * groups + group) * count + first
    valid = tl.arange(0, KEYS) < count - first
    position = tl.load(columns + tl.arange(0, KEYS), mask=valid, other=num_tokens)
    valid = position < num_tokens
    query_square, key_square = square(QUERIES, DIM, WIDTH), square(KEYS, DIM, WIDTH)
    keys = _some_rows_of(k + key_offset, key_square, count - first, KEYS, DIM, WIDTH, TYPE)
    values = _some_rows_of(v + key_offset, key_square, count - first, KEYS, DIM, WIDTH, TYPE)
    key_acc = tl.zeros([KEYS, WIDTH], dtype=ACC)
    value_acc = tl.zeros([KEYS, WIDTH], dtype=ACC)
    for i in range(0, (bottom - top) * (SHARE * SPLIT)):
        row = top + i // (SHARE * SPLIT)
        member = (i // SPLIT) % SHARE
        token = row * BLOCK + (i % SPLIT) * QUERIES
        place = offset + member * tokens + token
        queries = rows_of(q + place * DIM, query_square, DIM, WIDTH, TYPE)
        grads = rows_of(dout + place * DIM, query_square, DIM, WIDTH, TYPE)
        norm, deltas = normaliser(lse + place, delta + place, QUERIES)
        low, high, prefix_low, prefix_high = query_intervals(
            lo, hi, prefix_lo, prefix_hi, batch * tokens + token, QUERIES, PREFIX
        )
        kept = valid
        if GROUPED:
            kept = kept & (tl.load(column_group + row) == group)
        mask_head = batch * mask_heads + (kv_head * SHARE + member) * mask_heads // heads
        bits = tiles + (mask_head.to(tl.int64) * rows + row) * words
        kept = outside_tiles(bits, position, kept, BLOCK)
        seen = visible(position[:, None], low, high, prefix_low, prefix_high, PREFIX) & kept[:, None]
        key_acc, value_acc = add_by_key(
            queries, keys, values, grads, norm, deltas, seen, scale_log2, key_acc, value_acc, True, PRECISION
        )
    part = split.to(tl.int64) * split_stride + key_offset
    add_to(dk + part, key_square, count - first, key_acc * scale, KEYS, DIM, WIDTH)
    add_to(dv + part, key_square, count - first, value_acc, KEYS, DIM, WIDTH)
