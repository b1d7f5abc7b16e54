"""dQ of columns for Hopper in Gluon: by query tiles like the forward over columns, without atomics."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .bound import BoundPlan
from .hopper_backward import INFINITY, add_rows
from .hopper_columns import row_barriers, row_producer, segments, shown
from .hopper_columns_schedule import SIZE, row_table
from .hopper_dq import STAGES
from .hopper_forward import QUERIES, descriptor, padded, place_of, turns_of, visible_keys
from .triton_forward import LOG2E, intervals


def backward_rows(q, ck, cv, dout, lse, delta, bound: BoundPlan, dq, scale: float) -> None:
    """Adds the gradients of the columns to dq (fp32); inputs as TMA can read them, shapes of reference.py."""
    width = padded(q)
    table, live = row_table(bound, q.shape[1], ck.shape[1])
    programs = min(table.shape[0], torch.cuda.get_device_properties(q.device).multi_processor_count)
    _rows[(programs,)](
        descriptor(q, QUERIES // 2, width),
        descriptor(dout, QUERIES // 2, width),
        segments(ck, SIZE, width),
        segments(cv, SIZE, width),
        lse,
        delta,
        dq,
        table,
        live,
        bound.columns,
        bound.tiles,
        *intervals(bound),
        scale * LOG2E.value,
        scale,
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


@gluon.jit
def _tile(PART: gl.constexpr, MASKED: gl.constexpr, number, acc, norm, difference, seen, scale_log2,
          zeros, inputs, shared, bars, STAGES: gl.constexpr, PREFIX: gl.constexpr):  # fmt: skip
    """dQ with one tile of columns added."""
    queries, grads = inputs
    keys, values, positions = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty, p_full = bars
    KEYS: gl.constexpr = zeros.shape[1]
    WIDTH: gl.constexpr = acc.shape[1]
    stage = number % STAGES
    phase = (number // STAGES) & 1
    k = keys.index(stage).reshape([KEYS, WIDTH])
    v = values.index(stage).reshape([KEYS, WIDTH])
    mbarrier.wait(k_full.index(stage), phase)
    scores = warpgroup_mma(queries.index(PART), k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), phase)
    dweights = warpgroup_mma(grads.index(PART), v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(p_full.index(stage), phase)
    scores = warpgroup_mma_wait(1, deps=[scores])
    position = positions.index(stage).load(gl.SliceLayout(0, scores.type.layout))
    scores = shown(scores, position, seen, MASKED, PREFIX)
    weights = gl.exp2(scores * scale_log2 - norm[:, None])
    dweights = warpgroup_mma_wait(0, deps=[dweights])
    mbarrier.arrive(v_empty.index(stage), count=1)
    ds = (weights * (dweights - difference[:, None])).to(queries.dtype)
    operand = gl.convert_layout(ds, gl.DotOperandLayout(0, acc.type.layout, 2))
    acc = warpgroup_mma(operand, k, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(k_empty.index(stage), count=1)
    return acc


@gluon.jit
def _consumer(PART: gl.constexpr, lse, delta, dq, plan, bounds, rows, heads, scale_log2, scale, inputs,
              shared, bars, DIM: gl.constexpr, STAGES: gl.constexpr, PREFIX: gl.constexpr):  # fmt: skip
    table, live, columns, tiles, count, words, programs = plan
    queries, grads = inputs
    q_full, q_empty, k_full, k_empty, v_full, v_empty, p_full = bars
    HALF: gl.constexpr = queries.shape[1]
    WIDTH: gl.constexpr = queries.shape[2]
    KEYS: gl.constexpr = shared[2].shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    zeros = gl.full([HALF, KEYS], 0.0, gl.float32, SCORES)
    row = gl.arange(0, HALF, gl.SliceLayout(1, SCORES)) + PART * HALF
    taken = 0  # tiles of columns
    items = gl.load(live)
    for turn in range(0, turns_of(items, programs)):
        item = table + place_of(turn, programs) * 8
        tile, begin, end, clear = gl.load(item), gl.load(item + 1), gl.load(item + 2), gl.load(item + 4)
        n = (end - begin + KEYS - 1) // KEYS
        seen = visible_keys(bounds, tile, rows, heads, row, PREFIX)
        first = tile.to(gl.int64) * (2 * HALF)
        norm = gl.load(lse + first + row)
        norm = gl.where(norm == -INFINITY, INFINITY, norm * LOG2E)  # whoever saw nothing: weights 0
        difference = gl.load(delta + first + row)
        acc = gl.full([HALF, WIDTH], 0.0, gl.float32, SUMS)
        mbarrier.wait(q_full.index(PART), turn & 1)
        for i in range(0, clear):
            acc = _tile(PART, False, taken + i, acc, norm, difference, seen, scale_log2, zeros, inputs,
                        shared, bars, STAGES, PREFIX)  # fmt: skip
        for i in range(clear, n):
            acc = _tile(PART, True, taken + i, acc, norm, difference, seen, scale_log2, zeros, inputs,
                        shared, bars, STAGES, PREFIX)  # fmt: skip
        mbarrier.arrive(q_empty.index(PART), count=1)
        taken += n
        add_rows(dq, acc * scale, first + PART * HALF, DIM, False)


@gluon.jit(do_not_specialize=["count", "words", "rows", "heads", "programs"])
def _rows(
    dq_in, ddout, dk, dv, lse, delta, dq, table, live, columns, tiles, lo, hi, prefix_lo, prefix_hi,
    scale_log2, scale, count, words, rows, heads, programs, DIM: gl.constexpr, WIDTH: gl.constexpr,
    STAGES: gl.constexpr, PREFIX: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = dq_in.block_shape[0]
    KEYS: gl.constexpr = dk.block_shape[1]
    queries = gl.allocate_shared_memory(dq_in.dtype, [2, HALF, WIDTH], dq_in.layout)
    grads = gl.allocate_shared_memory(dq_in.dtype, [2, HALF, WIDTH], dq_in.layout)
    keys = gl.allocate_shared_memory(dk.dtype, [STAGES, 1, KEYS, WIDTH], dk.layout)
    values = gl.allocate_shared_memory(dv.dtype, [STAGES, 1, KEYS, WIDTH], dv.layout)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    positions = gl.allocate_shared_memory(gl.int32, [STAGES, KEYS], LINE)
    bars = row_barriers(STAGES)
    shared = (keys, values, positions)
    inputs = (queries, grads)
    plan = (table, live, columns, tiles, count, words, programs)
    bounds = (lo, hi, prefix_lo, prefix_hi)
    gl.warp_specialize(
        [
            (_consumer, (0, lse, delta, dq, plan, bounds, rows, heads, scale_log2, scale, inputs, shared,
                         bars, DIM, STAGES, PREFIX)),
            (_consumer, (1, lse, delta, dq, plan, bounds, rows, heads, scale_log2, scale, inputs, shared,
                         bars, DIM, STAGES, PREFIX)),
            (row_producer, ((dq_in, ddout), dk, dv, plan, inputs, shared, bars, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
