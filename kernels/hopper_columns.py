"""Forward over columns for Hopper in Gluon: like hopper_forward.py, over gathered keys of any position.

Persistent: one program per multiprocessor takes query tiles in the order of a table. The producer warp also
says, for every tile of columns, at which position each key stands, or NOWHERE if it does not count for the
row. Warpgroups compare these with the visible intervals, or where all is visible only with NOWHERE.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .bound import BoundPlan
from .hopper_columns_schedule import SIZE, row_table
from .hopper_forward import (
    LARGE,
    QUERIES,
    STAGES,
    TYPES,
    check,
    descriptor,
    in_fours,
    online_weights,
    padded,
    place_of,
    readable,
    turns_of,
    visible_keys,
)
from .triton_forward import LN2, LOG2E, intervals

NOWHERE = gl.constexpr(2**31 - 1)  # beyond every interval, and beyond LARGE


def forward_columns(q, ck, cv, bound: BoundPlan, out, lse, scale: float) -> None:
    """Continues `out` (fp32) and `lse` with the columns; a column inside a chosen tile is skipped.

    Shapes are those of reference.py. Queries with fewer than 128 columns in reach may multiply others by 0.
    """
    check(q, bound, scale)
    if bound.rows * bound.columns.shape[3] == 0:
        return
    width = padded(q)
    table, live = row_table(bound, q.shape[1], ck.shape[1])
    programs = min(table.shape[0], torch.cuda.get_device_properties(q.device).multi_processor_count)
    with torch.cuda.device(q.device):
        _forward[(programs,)](
            descriptor(readable(q), QUERIES // 2, width),
            segments(ck, SIZE, width),
            segments(cv, SIZE, width),
            out,
            lse,
            table,
            live,
            bound.columns,
            bound.tiles,
            *intervals(bound),
            scale * LOG2E.value,
            bound.columns.shape[3],
            bound.tiles.shape[3],
            bound.rows,
            q.shape[1],
            programs,
            DIM=q.shape[3],
            WIDTH=width,
            STAGES=STAGES[width],
            PREFIX=bound.prefix_lo is not None,
            num_warps=4,
        )


def segments(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """TMA descriptor of gathered columns [B, Hb, groups, C, D]: zeros outside of a segment and beyond D."""
    x = readable(x).flatten(0, 2)
    layout = gl.NVMMASharedLayout.get_default_for([1, rows, width], TYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, rows, width], layout)


@gluon.jit
def counting(columns, tiles, index, inside):
    """Positions of the columns `index`, NOWHERE for those not inside and those in a tile of a bitmask row."""
    position = gl.load(columns + index, mask=inside, other=0)
    word = gl.load(tiles + position // 4096, mask=inside, other=-1)
    outside = ((word >> (position // 128 % 32)) & 1) == 0
    return gl.where(outside, position, NOWHERE)


@gluon.jit
def shown(s, position, seen, MASKED: gl.constexpr, PREFIX: gl.constexpr):
    """Scores of keys that do not count, and if MASKED of those outside the visible intervals, become -inf."""
    at = position[None, :]
    if MASKED:
        low, high, prefix_low, prefix_high = seen
        kept = (at >= low[:, None]) & (at <= high[:, None])
        if PREFIX:
            kept = kept | ((at >= prefix_low[:, None]) & (at <= prefix_high[:, None]))
    else:
        kept = at != NOWHERE
    return gl.where(kept, s, float("-inf"))


@gluon.jit
def row_producer(inputs, dk, dv, plan, queries, shared, bars, STAGES: gl.constexpr):
    """Copies, for every query tile, the halves of all `inputs` and the tiles of its columns."""
    table, live, columns, tiles, count, words, programs = plan
    keys, values, positions = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty, p_full = bars
    HALF: gl.constexpr = inputs[0].block_shape[0]
    KEYS: gl.constexpr = positions.shape[1]
    EACH: gl.constexpr = gl.BlockedLayout([KEYS // 32], [32], [1], [0])
    each = gl.arange(0, KEYS, EACH)
    sent = 0  # tiles of columns
    items = gl.load(live)
    for turn in range(0, turns_of(items, programs)):
        item = table + place_of(turn, programs) * 8
        tile, begin, end = gl.load(item), gl.load(item + 1), gl.load(item + 2)
        above, clear, segment = gl.load(item + 3), gl.load(item + 4), gl.load(item + 5)
        positions_of_row = columns + gl.load(item + 6).to(gl.int64) * count
        tiles_of_row = tiles + gl.load(item + 7).to(gl.int64) * words
        n = (end - begin + KEYS - 1) // KEYS
        for i in range(0, n):
            # Clear tiles come first, then those above and those below them.
            other = gl.where(i - clear < above, i - clear, i)
            last = end - gl.where(i < clear, above + i, other) * KEYS
            # No key outside the range is read if it has a whole tile; the lowest tile reads some twice.
            first = gl.maximum(last - KEYS, gl.minimum(begin, end - KEYS))
            index = first + each
            position = counting(positions_of_row, tiles_of_row, index, (index >= begin) & (index < last))
            stage = (sent + i) % STAGES
            phase = (((sent + i) // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), dk.block_type.nbytes)
            tma.async_copy_global_to_shared(dk, [segment, first, 0], k_full.index(stage), keys.index(stage))
            positions.index(stage).store(position)
            mbarrier.arrive(p_full.index(stage), count=1)
            if i == 0:
                for part in gl.static_range(2):
                    mbarrier.wait(q_empty.index(part), (turn & 1) ^ 1)
                    mbarrier.expect(q_full.index(part), len(inputs) * inputs[0].block_type.nbytes)
                    for j in gl.static_range(len(inputs)):
                        half = queries[j].index(part)
                        at = tile * (2 * HALF) + part * HALF
                        tma.async_copy_global_to_shared(inputs[j], [at, 0], q_full.index(part), half)
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), dv.block_type.nbytes)
            tma.async_copy_global_to_shared(dv, [segment, first, 0], v_full.index(stage), values.index(stage))
        sent += n


@gluon.jit
def row_barriers(STAGES: gl.constexpr):
    """The barriers of row_producer and its two consumers."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    p_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    return q_full, q_empty, k_full, k_empty, v_full, v_empty, p_full


@gluon.jit
def _tile(MASKED: gl.constexpr, number, q, operand, acc, peak, total, seen, scale, zeros, shared, bars,
          STAGES: gl.constexpr, PREFIX: gl.constexpr):  # fmt: skip
    """One tile of columns: its scores and weights, while the weights of the tile before it are summed up."""
    keys, values, positions = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty, p_full = bars
    KEYS: gl.constexpr = zeros.shape[1]
    WIDTH: gl.constexpr = acc.shape[1]
    stage = number % STAGES
    before = (number - 1) % STAGES
    phase = (number // STAGES) & 1
    mbarrier.wait(k_full.index(stage), phase)
    k = keys.index(stage).reshape([KEYS, WIDTH])
    token = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((number - 1) // STAGES) & 1)
    sums = warpgroup_mma(operand, values.index(before).reshape([KEYS, WIDTH]), acc, is_async=True)
    mbarrier.wait(p_full.index(stage), phase)
    s = warpgroup_mma_wait(1, deps=[token])
    position = positions.index(stage).load(gl.SliceLayout(0, s.type.layout))
    s = shown(s, position, seen, MASKED, PREFIX)
    mbarrier.arrive(k_empty.index(stage), count=1)
    weights, decay, peak, total = online_weights(s, peak, total, scale)
    acc = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
    operand = gl.convert_layout(weights.to(q.dtype), operand.type.layout)
    return operand, acc, peak, total


@gluon.jit
def _consumer(PART: gl.constexpr, out, lse, plan, bounds, rows, heads, scale, queries, shared, bars,
              DIM: gl.constexpr, STAGES: gl.constexpr, PREFIX: gl.constexpr):  # fmt: skip
    table, live, columns, tiles, count, words, programs = plan
    keys, values, positions = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty, p_full = bars
    HALF: gl.constexpr = queries.shape[1]
    WIDTH: gl.constexpr = queries.shape[2]
    KEYS: gl.constexpr = positions.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    FOURS: gl.constexpr = in_fours(WIDTH)
    FOURS_ROW: gl.constexpr = gl.SliceLayout(1, FOURS)
    zeros = gl.full([HALF, KEYS], 0.0, gl.float32, SCORES)
    none = gl.full([HALF], float("-inf"), gl.float32, ROW)
    row = gl.arange(0, HALF, ROW) + PART * HALF
    fours_row = gl.arange(0, HALF, FOURS_ROW) + PART * HALF
    fours_column = gl.arange(0, WIDTH, gl.SliceLayout(0, FOURS))
    inside = (fours_column < DIM)[None, :]
    q = queries.index(PART)
    taken = 0  # tiles of columns
    items = gl.load(live)
    for turn in range(0, turns_of(items, programs)):
        item = table + place_of(turn, programs) * 8
        tile, begin, end, clear = gl.load(item), gl.load(item + 1), gl.load(item + 2), gl.load(item + 4)
        n = (end - begin + KEYS - 1) // KEYS
        seen = visible_keys(bounds, tile, rows, heads, row, PREFIX)
        stage = taken % STAGES
        phase = (taken // STAGES) & 1
        mbarrier.wait(q_full.index(PART), turn & 1)
        mbarrier.wait(k_full.index(stage), phase)
        k = keys.index(stage).reshape([KEYS, WIDTH])
        token = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(p_full.index(stage), phase)
        s = warpgroup_mma_wait(0, deps=[token])
        position = positions.index(stage).load(gl.SliceLayout(0, SCORES))
        low, high, prefix_low, prefix_high = seen
        wide = (gl.where(clear > 0, -LARGE, low), gl.where(clear > 0, LARGE, high), prefix_low, prefix_high)
        s = shown(s, position, wide, True, PREFIX)
        mbarrier.arrive(k_empty.index(stage), count=1)
        weights, decay, peak, total = online_weights(s, none, gl.zeros_like(none), scale)
        operand = gl.convert_layout(weights.to(q.dtype), OPERAND)
        acc = gl.full([HALF, WIDTH], 0.0, gl.float32, SUMS)
        for i in range(1, clear):
            operand, acc, peak, total = _tile(False, taken + i, q, operand, acc, peak, total, seen, scale,
                                              zeros, shared, bars, STAGES, PREFIX)  # fmt: skip
        for i in range(gl.maximum(clear, 1), n):
            operand, acc, peak, total = _tile(True, taken + i, q, operand, acc, peak, total, seen, scale,
                                              zeros, shared, bars, STAGES, PREFIX)  # fmt: skip
        mbarrier.arrive(q_empty.index(PART), count=1)
        taken += n
        stage = (taken - 1) % STAGES
        mbarrier.wait(v_full.index(stage), ((taken - 1) // STAGES) & 1)
        sums = warpgroup_mma(operand, values.index(stage).reshape([KEYS, WIDTH]), acc, is_async=True)
        first = tile.to(gl.int64) * (2 * HALF)
        state = lse + first + row
        carried = gl.load(state) * LOG2E
        total = gl.where(total == 0.0, 1.0, total)  # peak is -inf there
        peak += gl.log2(total)
        top = gl.maximum(carried, peak)
        shift = gl.where(top == float("-inf"), 0.0, top)
        kept = gl.exp2(carried - shift)
        added = gl.exp2(peak - shift)
        both = gl.where(top == float("-inf"), 1.0, kept + added)
        gl.store(state, (top + gl.log2(both)) * LN2)
        acc = warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(v_empty.index(stage), count=1)
        acc = acc * gl.convert_layout(added / (both * total), gl.SliceLayout(1, SUMS))[:, None]
        target = out + (first + fours_row)[:, None] * DIM + fours_column[None, :]
        part = gl.convert_layout(kept / both, FOURS_ROW)[:, None]
        known = gl.load(target, mask=(part > 0.0) & inside, other=0.0)  # what saw nothing is not read
        gl.store(target, gl.convert_layout(acc, FOURS) + known * part, mask=inside)


@gluon.jit(do_not_specialize=["count", "words", "rows", "heads", "programs"])
def _forward(
    dq, dk, dv, out, lse, table, live, columns, tiles, lo, hi, prefix_lo, prefix_hi, scale, count, words,
    rows, heads, programs, DIM: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
    PREFIX: gl.constexpr,
):  # fmt: skip
    KEYS: gl.constexpr = dk.block_shape[1]
    queries = gl.allocate_shared_memory(dq.dtype, [2, dq.block_shape[0], WIDTH], dq.layout)
    keys = gl.allocate_shared_memory(dk.dtype, [STAGES, 1, KEYS, WIDTH], dk.layout)
    values = gl.allocate_shared_memory(dv.dtype, [STAGES, 1, KEYS, WIDTH], dv.layout)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    positions = gl.allocate_shared_memory(gl.int32, [STAGES, KEYS], LINE)
    bars = row_barriers(STAGES)
    shared = (keys, values, positions)
    plan = (table, live, columns, tiles, count, words, programs)
    bounds = (lo, hi, prefix_lo, prefix_hi)
    gl.warp_specialize(
        [
            (_consumer, (0, out, lse, plan, bounds, rows, heads, scale, queries, shared, bars, DIM, STAGES,
                         PREFIX)),
            (_consumer, (1, out, lse, plan, bounds, rows, heads, scale, queries, shared, bars, DIM, STAGES,
                         PREFIX)),
            (row_producer, ((dq,), dk, dv, plan, (queries,), shared, bars, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
