"""Backward for Hopper in Gluon: a producer warp feeds two warpgroups of 64 keys each of one key block.

Keys stay, query tiles of all query heads of their key head stream by: five products a tile. Scores are
transposed, [keys, queries], so that weights and their gradients are operands in registers for dV and dK;
the gradients of the scores also pass through shared memory, once, for dQ. dQ of a tile is computed while
the next one is under way, so that no warpgroup waits for the other's half, and leaves as fp32 additions to
global memory. Those and the sums of split columns are in no fixed order: the deterministic mode leaves
dQ out (hopper_dq.py computes it by rows) and splits no columns.
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
from .hopper_forward import check, descriptor, in_fours, padded, readable
from .hopper_schedule import column_table
from .triton_forward import LOG2E, intervals

QUERIES = {64: 128, 128: 64}  # of a tile in flight, by padded head dim
KEYS = 128
INFINITY = gl.constexpr(float("inf"))


def backward_keys(q, k, v, dout, lse, delta, bound: BoundPlan, source: int, dq, dk, dv, scale: float) -> None:
    """Adds the gradients of the tiles of one source to dk and dv, and to dq unless that is None.

    Shapes and meanings are those of reference.backward_step. With dq None the result repeats bit for bit.
    """
    check(q, bound, scale)
    table, live = column_table(bound, source, q.shape[1], k.shape[1], split=dq is not None)
    width, kv_heads = padded(q), k.shape[1]
    lists = max(1, bound.mask_heads // kv_heads)
    q, k, v, dout, lse, delta = (readable(x) for x in (q, k, v, dout, lse, delta))
    with torch.cuda.device(q.device):
        _backward[(table.shape[0],)](
            descriptor(q, QUERIES[width], width),
            descriptor(dout, QUERIES[width], width),
            descriptor(k, KEYS // 2, width),
            descriptor(v, KEYS // 2, width),
            lse,
            delta,
            dk if dq is None else dq,
            dk,
            dv,
            table,
            live,
            bound.key_ptr,
            bound.key_full,
            bound.key_tiles,
            bound.key_base,
            *intervals(bound),
            scale * LOG2E.value,
            scale,
            source,
            bound.num_sources,
            bound.rows,
            bound.blocks_per_source,
            k.shape[2],
            q.shape[1],
            kv_heads,
            bound.mask_heads,
            LISTS=lists,
            SHARE=q.shape[1] // kv_heads // lists,
            DIM=q.shape[3],
            WIDTH=width,
            QUERIES=QUERIES[width],
            PREFIX=bound.prefix_lo is not None,
            WITH_DQ=dq is not None,
            num_warps=4,
        )


@gluon.jit
def _list(member, key_head, slot, part, parts, plan, LISTS: gl.constexpr):
    """(first entry, full tiles, tiles) of this part of the list of one mask head."""
    key_ptr, key_full, source, num_sources, slots, kv_heads, mask_heads = plan
    batch = key_head // kv_heads
    head = (key_head % kv_heads * LISTS + member) * mask_heads // (kv_heads * LISTS)
    x = ((batch * mask_heads + head) * num_sources + source) * slots + slot
    begin = gl.load(key_ptr + x)
    count = gl.load(key_ptr + x + 1) - begin
    first, last = count * part // parts, count * (part + 1) // parts
    full = gl.minimum(gl.maximum(gl.load(key_full + x) - first, 0), last - first)
    return begin + first, full, last - first


@gluon.jit
def _first_token(i, row, member, key_head, rows, heads, kv_heads, LISTS: gl.constexpr, SHARE: gl.constexpr,
                 QUERIES: gl.constexpr):  # fmt: skip
    """Where the queries of step i of a list begin: (counted over batch and heads, over the batch alone)."""
    SPLIT: gl.constexpr = 128 // QUERIES
    token = row * 128 + i % SPLIT * QUERIES
    batch = key_head // kv_heads
    head = (key_head % kv_heads * LISTS + member) * SHARE + i // SPLIT % SHARE
    return (batch * heads + head) * (rows * 128) + token, batch * (rows * 128) + token


@gluon.jit
def _codes(bounds, at, base, PREFIX: gl.constexpr):
    """The visible keys of a tile, for each query, as four bytes: begin, end, and those of the prefix."""
    lo, hi, prefix_lo, prefix_hi = bounds
    begin = gl.minimum(gl.maximum(gl.load(lo + at) - base, 0), 128)
    end = gl.minimum(gl.maximum(gl.load(hi + at) - base + 1, 0), 128)
    code = begin | (end << 8)
    if PREFIX:
        begin = gl.minimum(gl.maximum(gl.load(prefix_lo + at) - base, 0), 128)
        end = gl.minimum(gl.maximum(gl.load(prefix_hi + at) - base + 1, 0), 128)
        code = code | (begin << 16) | (end << 24)
    return code


@gluon.jit
def _producer(descriptors, lse, delta, bounds, entries, key_base, item, plan, sizes, shared, bars,
              LISTS: gl.constexpr, SHARE: gl.constexpr, PREFIX: gl.constexpr):  # fmt: skip
    dq, ddout, dk, dv = descriptors
    keys, values, queries, grads, rows_shared, dscores = shared
    norms, deltas, codes, tokens = rows_shared
    k_full, v_full, q_full, g_full, r_full, empty, s_full, s_empty = bars
    key_head, slot, part, parts = item
    rows, key_tokens, heads, kv_heads = sizes
    source, slots = plan[2], plan[4]
    QUERIES: gl.constexpr = queries.shape[1]
    STEP: gl.constexpr = SHARE * (128 // QUERIES)
    EACH: gl.constexpr = gl.BlockedLayout([QUERIES // 32], [32], [1], [0])
    each = gl.arange(0, QUERIES, EACH)
    base = gl.load(key_base + source * slots + slot)
    at = key_head * key_tokens + slot * 128
    mbarrier.expect(k_full, 2 * dk.block_type.nbytes)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(dk, [at + half * 64, 0], k_full, keys.index(half))
    mbarrier.expect(v_full, 2 * dv.block_type.nbytes)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(dv, [at + half * 64, 0], v_full, values.index(half))
    count = 0  # query tiles sent
    begin, full, n = _list(0, key_head, slot, part, parts, plan, LISTS)
    row = gl.load(entries + begin)
    for member in range(LISTS):
        following = _list(gl.minimum(member + 1, LISTS - 1), key_head, slot, part, parts, plan, LISTS)
        next_row = gl.load(entries + following[0])
        entry = entries + begin
        for i in range(0, n * STEP):
            stage = (count + i) & 1
            token, in_batch = _first_token(i, row, member, key_head, rows, heads, kv_heads, LISTS, SHARE,
                                           QUERIES)  # fmt: skip
            row = gl.load(entry + (i + 1) // STEP)
            norm = gl.load(lse + token + each)
            norm = gl.where(norm == -INFINITY, INFINITY, norm * LOG2E)  # whoever saw nothing: weights 0
            difference = gl.load(delta + token + each)
            mbarrier.wait(empty.index(stage), (((count + i) >> 1) & 1) ^ 1)
            mbarrier.expect(q_full.index(stage), dq.block_type.nbytes)
            tma.async_copy_global_to_shared(dq, [token, 0], q_full.index(stage), queries.index(stage))
            mbarrier.expect(g_full.index(stage), ddout.block_type.nbytes)
            tma.async_copy_global_to_shared(ddout, [token, 0], g_full.index(stage), grads.index(stage))
            norms.index(stage).store(norm)
            deltas.index(stage).store(difference)
            tokens.index(stage).store(gl.full([1], token, gl.int32, EACH))
            if i >= full * STEP:
                codes.index(stage).store(_codes(bounds, in_batch + each, base, PREFIX))
            mbarrier.arrive(r_full.index(stage), count=1)
        count += n * STEP
        begin, full, n = following
        row = next_row


@gluon.jit
def _visible(code, at, PREFIX: gl.constexpr):
    """Whether key `at` of the tile is seen, [keys, queries]."""
    seen = (at >= (code & 255)[None, :]) & (at < ((code >> 8) & 255)[None, :])
    if PREFIX:
        seen = seen | ((at >= ((code >> 16) & 255)[None, :]) & (at < ((code >> 24) & 255)[None, :]))
    return seen


@gluon.jit
def _start_dq(PART: gl.constexpr, buffer, phase, keys, dscores, s_full, zeros):
    """Issues dQ of a tile: of 64 queries half of the head dim, or of 128 queries 64 of them."""
    mbarrier.wait(s_full.index(buffer), phase)
    if dscores.shape[2] == 64:
        HALF: gl.constexpr = zeros.shape[1]
        left, right = dscores.index(buffer * 2), dscores.index(buffer * 2 + 1)
        first = keys.index(0).slice(PART * HALF, HALF, dim=1)
        second = keys.index(1).slice(PART * HALF, HALF, dim=1)
    else:
        left = dscores.index(buffer * 2).slice(PART * 64, 64, dim=1)
        right = dscores.index(buffer * 2 + 1).slice(PART * 64, 64, dim=1)
        first, second = keys.index(0), keys.index(1)
    sums = warpgroup_mma(left.permute((1, 0)), first, zeros, use_acc=False, is_async=True)
    return warpgroup_mma(right.permute((1, 0)), second, sums, is_async=True)


@gluon.jit
def _add_dq(PART: gl.constexpr, dq, token, x, scale, kept, DIM: gl.constexpr, QUERIES: gl.constexpr):
    """Adds this warpgroup's part of dQ of the tile that begins at `token`."""
    LAYOUT: gl.constexpr = in_fours(x.shape[1])
    x = gl.convert_layout(x, LAYOUT)
    row = token + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
    if QUERIES == 64:
        column += PART * x.shape[1]
    else:
        row += PART * 64
    target = dq + row.to(gl.int64)[:, None] * DIM + column[None, :]
    gl.atomic_add(target, x * scale, mask=(column < DIM)[None, :] & kept, sem="relaxed")


@gluon.jit
def _tile(PART: gl.constexpr, MASKED: gl.constexpr, count, dk, dv, before, dq, scale_log2, scale, at,
          zeros, dq_zeros, shared, bars, DIM: gl.constexpr, PREFIX: gl.constexpr,
          WITH_DQ: gl.constexpr):  # fmt: skip
    """One query tile: dk and dv with it added, and where it begins; dQ of the one that begins at `before`."""
    keys, values, queries, grads, rows_shared, dscores = shared
    norms, deltas, codes, tokens = rows_shared
    k_full, v_full, q_full, g_full, r_full, empty, s_full, s_empty = bars
    SCORES: gl.constexpr = zeros.type.layout
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    QUERY: gl.constexpr = gl.SliceLayout(0, SCORES)
    TYPE: gl.constexpr = keys.dtype
    stage = count & 1
    phase = (count >> 1) & 1
    mbarrier.wait(q_full.index(stage), phase)
    q = queries.index(stage)
    scores = warpgroup_mma(keys.index(PART), q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(g_full.index(stage), phase)
    dout = grads.index(stage)
    dweights = warpgroup_mma(values.index(PART), dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(r_full.index(stage), phase)
    scores = warpgroup_mma_wait(1, deps=[scores])
    weights = gl.exp2(scores * scale_log2 - norms.index(stage).load(QUERY)[None, :])
    if MASKED:
        weights = gl.where(_visible(codes.index(stage).load(QUERY), at, PREFIX), weights, 0.0)
    operand = gl.convert_layout(weights.to(TYPE), OPERAND)
    dv = warpgroup_mma(operand, dout, dv, is_async=True)
    dweights = warpgroup_mma_wait(1, deps=[dweights])
    ds = (weights * (dweights - deltas.index(stage).load(QUERY)[None, :])).to(TYPE)
    dk = warpgroup_mma(gl.convert_layout(ds, OPERAND), q, dk, is_async=True)
    token = before
    if WITH_DQ:
        token = tokens.index(stage).load(before.type.layout)
        mbarrier.wait(s_empty.index(stage), phase ^ (1 - stage))
        dscores.index(stage * 2 + PART).store(ds)
        fence_async_shared()
        mbarrier.arrive(s_full.index(stage), count=1)
        # The first tile computes dQ of whatever the other buffer holds, and adds it nowhere.
        sums = _start_dq(PART, 1 - stage, phase, keys, dscores, s_full, dq_zeros)
        dk, dv, sums = warpgroup_mma_wait(0, deps=[dk, dv, sums])
        mbarrier.arrive(empty.index(stage), count=1)
        mbarrier.arrive(s_empty.index(1 - stage), count=1)
        _add_dq(PART, dq, before, sums, scale, count > 0, DIM, queries.shape[1])
    else:
        dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
        mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv, token


@gluon.jit
def add_rows(target, x, first, DIM: gl.constexpr, ATOMIC: gl.constexpr):
    """Adds x to 64 rows from row `first` on."""
    LAYOUT: gl.constexpr = in_fours(x.shape[1])
    x = gl.convert_layout(x, LAYOUT)
    row = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
    places = target + (first.to(gl.int64) + row)[:, None] * DIM + column[None, :]
    inside = (column < DIM)[None, :]
    if ATOMIC:
        gl.atomic_add(places, x, mask=inside, sem="relaxed")
    else:
        gl.store(places, gl.load(places, mask=inside) + x, mask=inside)


@gluon.jit
def _consumer(PART: gl.constexpr, dq, dk_out, dv_out, item, plan, sizes, scale_log2, scale, shared,
              bars, LISTS: gl.constexpr, SHARE: gl.constexpr, DIM: gl.constexpr, PREFIX: gl.constexpr,
              WITH_DQ: gl.constexpr):  # fmt: skip
    keys, values, queries, grads, rows_shared, dscores = shared
    k_full, v_full, q_full, g_full, r_full, empty, s_full, s_empty = bars
    key_head, slot, part, parts = item
    key_tokens = sizes[1]
    QUERIES: gl.constexpr = queries.shape[1]
    WIDTH: gl.constexpr = queries.shape[2]
    DQ_WIDTH: gl.constexpr = WIDTH // 2 if QUERIES == 64 else WIDTH
    STEP: gl.constexpr = SHARE * (128 // QUERIES)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    DQ_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_WIDTH, 16])
    dk = gl.full([64, WIDTH], 0.0, gl.float32, SUMS)
    dv = gl.full([64, WIDTH], 0.0, gl.float32, SUMS)
    zeros = gl.full([64, QUERIES], 0.0, gl.float32, SCORES)
    dq_zeros = gl.full([64, DQ_WIDTH], 0.0, gl.float32, DQ_SUMS)
    at = (gl.arange(0, 64, gl.SliceLayout(1, SCORES)) + PART * 64)[:, None]
    mbarrier.wait(k_full, 0)
    mbarrier.wait(v_full, 0)
    if WITH_DQ:
        mbarrier.arrive(s_full.index(1), count=1)
    count = 0  # query tiles computed
    before = gl.zeros([1], gl.int32, gl.SliceLayout(1, in_fours(DQ_WIDTH)))
    full, n = _list(0, key_head, slot, part, parts, plan, LISTS)[1:]
    for member in range(LISTS):
        following = _list(gl.minimum(member + 1, LISTS - 1), key_head, slot, part, parts, plan, LISTS)
        for i in range(0, full * STEP):
            dk, dv, before = _tile(PART, False, count + i, dk, dv, before, dq, scale_log2, scale, at, zeros,
                                   dq_zeros, shared, bars, DIM, PREFIX, WITH_DQ)  # fmt: skip
        count += full * STEP
        for i in range(0, (n - full) * STEP):
            dk, dv, before = _tile(PART, True, count + i, dk, dv, before, dq, scale_log2, scale, at, zeros,
                                   dq_zeros, shared, bars, DIM, PREFIX, WITH_DQ)  # fmt: skip
        count += (n - full) * STEP
        full, n = following[1:]
    if WITH_DQ:
        last = (count & 1) ^ 1
        sums = _start_dq(PART, last, (count >> 1) & 1, keys, dscores, s_full, dq_zeros)
        sums = warpgroup_mma_wait(0, deps=[sums])
        _add_dq(PART, dq, before, sums, scale, count > 0, DIM, QUERIES)
    first = key_head * key_tokens + slot * 128 + PART * 64
    add_rows(dv_out, dv, first, DIM, WITH_DQ)
    add_rows(dk_out, dk * scale, first, DIM, WITH_DQ)


@gluon.jit(do_not_specialize=["source", "num_sources", "rows", "slots", "key_tokens", "heads", "kv_heads",
                              "mask_heads"])  # fmt: skip
def _backward(
    dq_in, ddout, dk_in, dv_in, lse, delta, dq, dk, dv, table, live, key_ptr, key_full, key_tiles, key_base,
    lo, hi, prefix_lo, prefix_hi, scale_log2, scale, source, num_sources, rows, slots, key_tokens, heads,
    kv_heads, mask_heads, LISTS: gl.constexpr, SHARE: gl.constexpr, DIM: gl.constexpr, WIDTH: gl.constexpr,
    QUERIES: gl.constexpr, PREFIX: gl.constexpr, WITH_DQ: gl.constexpr,
):  # fmt: skip
    if gl.program_id(0) < gl.load(live):
        keys = gl.allocate_shared_memory(dk_in.dtype, [2, 64, WIDTH], dk_in.layout)
        values = gl.allocate_shared_memory(dv_in.dtype, [2, 64, WIDTH], dv_in.layout)
        queries = gl.allocate_shared_memory(dq_in.dtype, [2, QUERIES, WIDTH], dq_in.layout)
        grads = gl.allocate_shared_memory(ddout.dtype, [2, QUERIES, WIDTH], ddout.layout)
        LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        norms = gl.allocate_shared_memory(gl.float32, [2, QUERIES], LINE)
        deltas = gl.allocate_shared_memory(gl.float32, [2, QUERIES], LINE)
        codes = gl.allocate_shared_memory(gl.int32, [2, QUERIES], LINE)
        tokens = gl.allocate_shared_memory(gl.int32, [2, 1], LINE)
        dscores = gl.allocate_shared_memory(
            dq_in.dtype, [4 if WITH_DQ else 1, 64, QUERIES], gl.NVMMASharedLayout(128, 16, 2)
        )
        BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
        k_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
        v_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
        q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
        g_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
        r_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
        empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
        s_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
        s_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
        mbarrier.init(k_full, count=1)
        mbarrier.init(v_full, count=1)
        for i in gl.static_range(2):
            mbarrier.init(q_full.index(i), count=1)
            mbarrier.init(g_full.index(i), count=1)
            mbarrier.init(r_full.index(i), count=1)
            mbarrier.init(empty.index(i), count=2)
            mbarrier.init(s_full.index(i), count=2)
            mbarrier.init(s_empty.index(i), count=2)
        fence_async_shared()
        shared = (keys, values, queries, grads, (norms, deltas, codes, tokens), dscores)
        bars = (k_full, v_full, q_full, g_full, r_full, empty, s_full, s_empty)
        place = table + gl.program_id(0) * 4
        item = (gl.load(place), gl.load(place + 1), gl.load(place + 2), gl.load(place + 3))
        plan = (key_ptr, key_full, source, num_sources, slots, kv_heads, mask_heads)
        sizes = (rows, key_tokens, heads, kv_heads)
        bounds = (lo, hi, prefix_lo, prefix_hi)
        inputs = (dq_in, ddout, dk_in, dv_in)
        gl.warp_specialize(
            [
                (_consumer, (0, dq, dk, dv, item, plan, sizes, scale_log2, scale, shared, bars,
                             LISTS, SHARE, DIM, PREFIX, WITH_DQ)),
                (_consumer, (1, dq, dk, dv, item, plan, sizes, scale_log2, scale, shared, bars,
                             LISTS, SHARE, DIM, PREFIX, WITH_DQ)),
                (_producer, (inputs, lse, delta, bounds, key_tiles, key_base, item, plan, sizes, shared, bars,
                             LISTS, SHARE, PREFIX)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
