"""Backward over columns for Hopper in Gluon: dK and dV by tiles of 128 columns; dQ in hopper_columns_dq.py.

Both without atomics, so that results repeat bit for bit. Nearly every row sees every column before it: the
rows of a column tile are cut into parts, whose sums are added in order. Otherwise like hopper_backward.py.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .bound import BoundPlan
from .hopper_backward import INFINITY, QUERIES
from .hopper_columns import NOWHERE, counting, segments
from .hopper_columns_dq import backward_rows
from .hopper_columns_schedule import SIZE, row_lists
from .hopper_forward import check, descriptor, in_fours, padded, readable
from .triton_forward import LOG2E, intervals

PROGRAMS = 1024  # of dK and dV: rows are cut into parts until there are about so many


def backward_columns(q, ck, cv, dout, lse, delta, bound: BoundPlan, dq, dck, dcv, scale: float) -> None:
    """Adds the gradients of the columns to dq and to dck, dcv (shaped like ck), all fp32.

    Shapes and meanings are those of reference.py.
    """
    check(q, bound, scale)
    if bound.rows * bound.columns.shape[3] == 0:
        return
    q, ck, cv, dout, lse, delta = (readable(x) for x in (q, ck, cv, dout, lse, delta))
    with torch.cuda.device(q.device):
        backward_rows(q, ck, cv, dout, lse, delta, bound, dq, scale)
        _backward_keys(q, ck, cv, dout, lse, delta, bound, dck, dcv, scale)


def _backward_keys(q, ck, cv, dout, lse, delta, bound: BoundPlan, dck, dcv, scale: float) -> None:
    width, count = padded(q), ck.shape[3]
    entries, sizes = row_lists(bound)
    items = ck.shape[:3].numel() * -(-count // SIZE)
    parts = max(1, min(PROGRAMS // items, bound.rows // 4))
    sums = torch.empty(2, parts, *ck.shape, dtype=torch.float32, device=q.device)
    _keys[(items * parts,)](
        descriptor(q, QUERIES[width], width),
        descriptor(dout, QUERIES[width], width),
        segments(ck, SIZE // 2, width),
        segments(cv, SIZE // 2, width),
        lse,
        delta,
        *sums,
        entries,
        sizes,
        bound.columns,
        bound.tiles,
        *intervals(bound),
        scale * LOG2E.value,
        scale,
        parts,
        count,
        ck.shape[2],
        bound.plan.geometry.num_tokens,
        bound.tiles.shape[3],
        bound.rows,
        q.shape[1],
        ck.shape[1],
        bound.mask_heads,
        bound.columns.shape[1],
        SHARE=q.shape[1] // ck.shape[1],
        DIM=q.shape[3],
        WIDTH=width,
        QUERIES=QUERIES[width],
        PREFIX=bound.prefix_lo is not None,
        num_warps=4,
    )
    for total, partial in zip((dck, dcv), sums, strict=True):
        total.add_(partial.sum(0))


@gluon.jit
def _producer(descriptors, lse, delta, bounds, columns, tiles, item, sizes, shared, bars,
              SHARE: gl.constexpr, PREFIX: gl.constexpr):  # fmt: skip
    dq, ddout, dk, dv = descriptors
    lo, hi, prefix_lo, prefix_hi = bounds
    keys, values, queries, grads, lines = shared
    norms, deltas, positions, lows, highs, prefix_lows, prefix_highs = lines
    k_full, v_full, q_full, g_full, r_full, empty = bars
    segment, first, batch, head, column_head, entry, clear, n = item
    count, groups, tokens, words, rows, heads, mask_heads = sizes
    QUERIES: gl.constexpr = queries.shape[1]
    KEYS: gl.constexpr = positions.shape[1]
    SPLIT: gl.constexpr = KEYS // QUERIES
    STEP: gl.constexpr = SHARE * SPLIT
    mbarrier.expect(k_full, 2 * dk.block_type.nbytes)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(dk, [segment, first + half * 64, 0], k_full, keys.index(half))
    mbarrier.expect(v_full, 2 * dv.block_type.nbytes)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(dv, [segment, first + half * 64, 0], v_full, values.index(half))
    EACH: gl.constexpr = gl.BlockedLayout([QUERIES // 32], [32], [1], [0])
    each = gl.arange(0, QUERIES, EACH)
    key = first + gl.arange(0, KEYS, gl.BlockedLayout([KEYS // 32], [32], [1], [0]))
    columns += (column_head.to(gl.int64) * groups + segment % groups) * count
    held = gl.load(columns + key, mask=key < count, other=tokens) < tokens
    row = gl.load(entry)
    for i in range(0, n * STEP):
        stage = i & 1
        member = head + i // SPLIT % SHARE
        in_batch = (batch * rows + row) * KEYS + i % SPLIT * QUERIES
        token = ((batch * heads + member) * rows + row) * KEYS + i % SPLIT * QUERIES
        mask_row = (batch * mask_heads + member * mask_heads // heads) * rows + row
        position = counting(columns, tiles + mask_row.to(gl.int64) * words, key, held)
        row = gl.load(entry + (i + 1) // STEP)
        norm = gl.load(lse + token + each)
        norm = gl.where(norm == -INFINITY, INFINITY, norm * LOG2E)  # whoever saw nothing: weights 0
        difference = gl.load(delta + token + each)
        mbarrier.wait(empty.index(stage), ((i >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(stage), dq.block_type.nbytes)
        tma.async_copy_global_to_shared(dq, [token, 0], q_full.index(stage), queries.index(stage))
        mbarrier.expect(g_full.index(stage), ddout.block_type.nbytes)
        tma.async_copy_global_to_shared(ddout, [token, 0], g_full.index(stage), grads.index(stage))
        positions.index(stage).store(position)
        norms.index(stage).store(norm)
        deltas.index(stage).store(difference)
        if i >= clear * STEP:
            lows.index(stage).store(gl.load(lo + in_batch + each))
            highs.index(stage).store(gl.load(hi + in_batch + each))
            if PREFIX:
                prefix_lows.index(stage).store(gl.load(prefix_lo + in_batch + each))
                prefix_highs.index(stage).store(gl.load(prefix_hi + in_batch + each))
        mbarrier.arrive(r_full.index(stage), count=1)


@gluon.jit
def _tile(PART: gl.constexpr, MASKED: gl.constexpr, i, dk, dv, scale_log2, zeros, shared, bars,
          PREFIX: gl.constexpr):  # fmt: skip
    """dk and dv with one query tile added."""
    keys, values, queries, grads, lines = shared
    norms, deltas, positions, lows, highs, prefix_lows, prefix_highs = lines
    k_full, v_full, q_full, g_full, r_full, empty = bars
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    QUERY: gl.constexpr = gl.SliceLayout(0, zeros.type.layout)
    KEY: gl.constexpr = gl.SliceLayout(1, zeros.type.layout)
    stage = i & 1
    phase = (i >> 1) & 1
    k = keys.index(PART).reshape([64, queries.shape[2]])
    v = values.index(PART).reshape([64, queries.shape[2]])
    mbarrier.wait(q_full.index(stage), phase)
    q = queries.index(stage)
    scores = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(g_full.index(stage), phase)
    dout = grads.index(stage)
    dweights = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(r_full.index(stage), phase)
    scores = warpgroup_mma_wait(1, deps=[scores])
    weights = gl.exp2(scores * scale_log2 - norms.index(stage).load(QUERY)[None, :])
    at = positions.index(stage).slice(PART * 64, 64).load(KEY)[:, None]
    if MASKED:
        kept = at >= lows.index(stage).load(QUERY)[None, :]
        kept = kept & (at <= highs.index(stage).load(QUERY)[None, :])
        if PREFIX:
            prefix = at >= prefix_lows.index(stage).load(QUERY)[None, :]
            kept = kept | (prefix & (at <= prefix_highs.index(stage).load(QUERY)[None, :]))
    else:
        kept = at != NOWHERE
    weights = gl.where(kept, weights, 0.0)
    dv = warpgroup_mma(gl.convert_layout(weights.to(q.dtype), OPERAND), dout, dv, is_async=True)
    dweights = warpgroup_mma_wait(1, deps=[dweights])
    ds = (weights * (dweights - deltas.index(stage).load(QUERY)[None, :])).to(q.dtype)
    dk = warpgroup_mma(gl.convert_layout(ds, OPERAND), q, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _store(target, x, first, last, DIM: gl.constexpr):
    """Writes those of the 64 rows of x that stand before `last`, from row `first` on."""
    LAYOUT: gl.constexpr = in_fours(x.shape[1])
    row = first + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
    places = target + row.to(gl.int64)[:, None] * DIM + column[None, :]
    gl.store(places, gl.convert_layout(x, LAYOUT), mask=(row < last)[:, None] & (column < DIM)[None, :])


@gluon.jit
def _consumer(PART: gl.constexpr, dk_out, dv_out, item, place, count, scale_log2, scale, shared, bars,
              SHARE: gl.constexpr, DIM: gl.constexpr, PREFIX: gl.constexpr):  # fmt: skip
    queries = shared[2]
    k_full, v_full, q_full, g_full, r_full, empty = bars
    segment, first, batch, head, column_head, entry, clear, n = item
    QUERIES: gl.constexpr = queries.shape[1]
    WIDTH: gl.constexpr = queries.shape[2]
    STEP: gl.constexpr = SHARE * (128 // QUERIES)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    dk = gl.full([64, WIDTH], 0.0, gl.float32, SUMS)
    dv = gl.full([64, WIDTH], 0.0, gl.float32, SUMS)
    zeros = gl.full([64, QUERIES], 0.0, gl.float32, SCORES)
    mbarrier.wait(k_full, 0)
    mbarrier.wait(v_full, 0)
    for i in range(0, clear * STEP):
        dk, dv = _tile(PART, False, i, dk, dv, scale_log2, zeros, shared, bars, PREFIX)
    for i in range(clear * STEP, n * STEP):
        dk, dv = _tile(PART, True, i, dk, dv, scale_log2, zeros, shared, bars, PREFIX)
    at = place.to(gl.int64) * count * DIM  # of the segment in the part
    _store(dk_out + at, dk * scale, first + PART * 64, count, DIM)
    _store(dv_out + at, dv, first + PART * 64, count, DIM)


@gluon.jit(do_not_specialize=["parts", "count", "groups", "tokens", "words", "rows", "heads", "kv_heads",
                              "mask_heads", "column_heads"])  # fmt: skip
def _keys(
    dq_in, ddout, dk_in, dv_in, lse, delta, dk, dv, entries, sizes, columns, tiles, lo, hi, prefix_lo,
    prefix_hi, scale_log2, scale, parts, count, groups, tokens, words, rows, heads, kv_heads, mask_heads,
    column_heads, SHARE: gl.constexpr, DIM: gl.constexpr, WIDTH: gl.constexpr, QUERIES: gl.constexpr,
    PREFIX: gl.constexpr,
):  # fmt: skip
    KEYS: gl.constexpr = 128
    keys = gl.allocate_shared_memory(dk_in.dtype, [2, 1, 64, WIDTH], dk_in.layout)
    values = gl.allocate_shared_memory(dv_in.dtype, [2, 1, 64, WIDTH], dv_in.layout)
    queries = gl.allocate_shared_memory(dq_in.dtype, [2, QUERIES, WIDTH], dq_in.layout)
    grads = gl.allocate_shared_memory(ddout.dtype, [2, QUERIES, WIDTH], ddout.layout)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    norms = gl.allocate_shared_memory(gl.float32, [2, QUERIES], LINE)
    deltas = gl.allocate_shared_memory(gl.float32, [2, QUERIES], LINE)
    positions = gl.allocate_shared_memory(gl.int32, [2, KEYS], LINE)
    lows = gl.allocate_shared_memory(gl.int32, [2, QUERIES], LINE)
    highs = gl.allocate_shared_memory(gl.int32, [2, QUERIES], LINE)
    prefix_lows = gl.allocate_shared_memory(gl.int32, [2, QUERIES], LINE)
    prefix_highs = gl.allocate_shared_memory(gl.int32, [2, QUERIES], LINE)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    g_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    r_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(g_full.index(i), count=1)
        mbarrier.init(r_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    column_tiles = (count + KEYS - 1) // KEYS
    column_tile = gl.program_id(0) % column_tiles
    part = gl.program_id(0) // column_tiles % parts
    segment = gl.program_id(0) // column_tiles // parts
    buffer = segment // groups  # counted over the batch
    batch = buffer // kv_heads
    column_head = batch * column_heads + buffer % kv_heads * column_heads // kv_heads
    rows_of_tile = (column_head * groups + segment % groups) * column_tiles + column_tile
    listed = gl.load(sizes + rows_of_tile * 2 + 1)
    begin, end = listed * part // parts, listed * (part + 1) // parts
    clear = gl.minimum(gl.maximum(gl.load(sizes + rows_of_tile * 2) - begin, 0), end - begin)
    entry = entries + rows_of_tile.to(gl.int64) * (rows + 1) + begin
    item = (segment, column_tile * KEYS, batch, buffer % kv_heads * SHARE, column_head, entry, clear,
            end - begin)  # fmt: skip
    lines = (norms, deltas, positions, lows, highs, prefix_lows, prefix_highs)
    shared = (keys, values, queries, grads, lines)
    bars = (k_full, v_full, q_full, g_full, r_full, empty)
    bounds = (lo, hi, prefix_lo, prefix_hi)
    inputs = (dq_in, ddout, dk_in, dv_in)
    extents = (count, groups, tokens, words, rows, heads, mask_heads)
    place = part * (gl.num_programs(0) // column_tiles // parts) + segment
    gl.warp_specialize(
        [
            (_consumer, (0, dk, dv, item, place, count, scale_log2, scale, shared, bars, SHARE, DIM, PREFIX)),
            (_consumer, (1, dk, dv, item, place, count, scale_log2, scale, shared, bars, SHARE, DIM, PREFIX)),
            (_producer, (inputs, lse, delta, bounds, columns, tiles, item, extents, shared, bars, SHARE,
                         PREFIX)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
