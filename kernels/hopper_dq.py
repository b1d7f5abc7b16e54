"""dQ for Hopper in Gluon, by query tiles like the forward and without atomics: for the deterministic mode."""

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
from .hopper_forward import QUERIES, check, descriptor, masked, padded, readable, visible_keys
from .hopper_schedule import work_table
from .triton_forward import LOG2E, intervals

STAGES = {64: 4, 128: 2}  # of keys and values in shared memory, by padded head dim


def backward_rows(q, k, v, dout, lse, delta, bound: BoundPlan, source: int, dq, scale: float) -> None:
    """Adds the gradients of the tiles of one source to dq (fp32); shapes as in reference.backward_step."""
    check(q, bound, scale)
    table, live = work_table(bound, source, q.shape[1], k)
    width = padded(q)
    q, k, v, dout, lse, delta = (readable(x) for x in (q, k, v, dout, lse, delta))
    with torch.cuda.device(q.device):
        _rows[(table.shape[0],)](
            descriptor(q, QUERIES // 2, width),
            descriptor(dout, QUERIES // 2, width),
            descriptor(k, bound.block_size, width),
            descriptor(v, bound.block_size, width),
            lse,
            delta,
            dq,
            table,
            live,
            bound.row_tiles,
            bound.key_base[source * bound.blocks_per_source :],
            *intervals(bound),
            scale * LOG2E.value,
            scale,
            bound.rows,
            k.shape[2],
            q.shape[1],
            q.shape[1] // k.shape[1],
            KEYS=bound.block_size,
            DIM=q.shape[3],
            WIDTH=width,
            STAGES=STAGES[width],
            PREFIX=bound.prefix_lo is not None,
            num_warps=4,
        )


@gluon.jit
def _producer(descriptors, row_tiles, item, rows, key_tokens, group, shared, bars, KEYS: gl.constexpr,
              STAGES: gl.constexpr):  # fmt: skip
    dq, ddout, dk, dv = descriptors
    queries, grads, keys, values = shared
    q_full, full, empty = bars
    tile, begin, _, n = item
    HALF: gl.constexpr = queries.shape[1]
    for part in gl.static_range(2):
        at = tile * (2 * HALF) + part * HALF
        mbarrier.expect(q_full.index(part), 2 * dq.block_type.nbytes)
        tma.async_copy_global_to_shared(dq, [at, 0], q_full.index(part), queries.index(part))
        tma.async_copy_global_to_shared(ddout, [at, 0], q_full.index(part), grads.index(part))
    entry = row_tiles + begin
    slot = gl.load(entry)
    first = tile // rows // group * key_tokens
    for i in range(0, n):
        stage = i % STAGES
        at = first + slot * KEYS
        slot = gl.load(entry + i + 1)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), 2 * dk.block_type.nbytes)
        tma.async_copy_global_to_shared(dk, [at, 0], full.index(stage), keys.index(stage))
        tma.async_copy_global_to_shared(dv, [at, 0], full.index(stage), values.index(stage))


@gluon.jit
def _tile(PART: gl.constexpr, MASKED: gl.constexpr, i, acc, norm, difference, seen, base, scale_log2, zeros,
          shared, bars, STAGES: gl.constexpr, PREFIX: gl.constexpr):  # fmt: skip
    """dQ with one key tile added."""
    queries, grads, keys, values = shared
    q_full, full, empty = bars
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    stage = i % STAGES
    mbarrier.wait(full.index(stage), (i // STAGES) & 1)
    k = keys.index(stage)
    v = values.index(stage)
    scores = warpgroup_mma(queries.index(PART), k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dweights = warpgroup_mma(grads.index(PART), v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if MASKED:
        low, high, prefix_low, prefix_high = seen
        scores = masked(scores, base, low, high, prefix_low, prefix_high, PREFIX)
    weights = gl.exp2(scores * scale_log2 - norm[:, None])
    dweights = warpgroup_mma_wait(0, deps=[dweights])
    ds = gl.convert_layout((weights * (dweights - difference[:, None])).to(queries.dtype), OPERAND)
    acc = warpgroup_mma(ds, k, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(stage), count=1)
    return acc


@gluon.jit
def _consumer(PART: gl.constexpr, lse, delta, dq, row_tiles, key_base, bounds, item, rows, heads,
              scale_log2, scale, shared, bars, DIM: gl.constexpr, STAGES: gl.constexpr,
              PREFIX: gl.constexpr):  # fmt: skip
    queries, grads, keys, values = shared
    q_full, full_bar, empty = bars
    tile, begin, full, n = item
    HALF: gl.constexpr = queries.shape[1]
    WIDTH: gl.constexpr = queries.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, keys.shape[1], 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    zeros = gl.full([HALF, keys.shape[1]], 0.0, gl.float32, SCORES)
    acc = gl.full([HALF, WIDTH], 0.0, gl.float32, SUMS)
    row = gl.arange(0, HALF, ROW) + PART * HALF
    first = tile.to(gl.int64) * (2 * HALF)
    norm = gl.load(lse + first + row)
    norm = gl.where(norm == float("-inf"), float("inf"), norm * LOG2E)  # whoever saw nothing: weights 0
    difference = gl.load(delta + first + row)
    entry = row_tiles + begin
    mbarrier.wait(q_full.index(PART), 0)
    for i in range(0, full):
        acc = _tile(PART, False, i, acc, norm, difference, (), 0, scale_log2, zeros, shared, bars, STAGES,
                    PREFIX)  # fmt: skip
    base = gl.load(key_base + gl.load(entry + full))
    seen = visible_keys(bounds, tile, rows, heads, row, PREFIX)
    for i in range(full, n):
        acc = _tile(PART, True, i, acc, norm, difference, seen, base, scale_log2, zeros, shared, bars, STAGES,
                    PREFIX)  # fmt: skip
        base = gl.load(key_base + gl.load(entry + i + 1))
    target_row = gl.arange(0, HALF, gl.SliceLayout(1, SUMS)) + PART * HALF
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, SUMS))
    target = dq + (first + target_row)[:, None] * DIM + column[None, :]
    inside = (column < DIM)[None, :]
    gl.store(target, gl.load(target, mask=inside) + acc * scale, mask=inside)


@gluon.jit(do_not_specialize=["rows", "key_tokens", "heads", "group"])
def _rows(
    dq_in, ddout, dk, dv, lse, delta, dq, table, live, row_tiles, key_base, lo, hi, prefix_lo, prefix_hi,
    scale_log2, scale, rows, key_tokens, heads, group, KEYS: gl.constexpr, DIM: gl.constexpr,
    WIDTH: gl.constexpr, STAGES: gl.constexpr, PREFIX: gl.constexpr,
):  # fmt: skip
    if gl.program_id(0) < gl.load(live):
        HALF: gl.constexpr = dq_in.block_shape[0]
        queries = gl.allocate_shared_memory(dq_in.dtype, [2, HALF, WIDTH], dq_in.layout)
        grads = gl.allocate_shared_memory(ddout.dtype, [2, HALF, WIDTH], ddout.layout)
        keys = gl.allocate_shared_memory(dk.dtype, [STAGES, KEYS, WIDTH], dk.layout)
        values = gl.allocate_shared_memory(dv.dtype, [STAGES, KEYS, WIDTH], dv.layout)
        BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
        q_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
        for i in gl.static_range(2):
            mbarrier.init(q_full.index(i), count=1)
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=2)
        fence_async_shared()
        place = table + gl.program_id(0) * 4
        item = (gl.load(place), gl.load(place + 1), gl.load(place + 2), gl.load(place + 3))
        shared = (queries, grads, keys, values)
        bars = (q_full, full, empty)
        bounds = (lo, hi, prefix_lo, prefix_hi)
        gl.warp_specialize(
            [
                (_consumer, (0, lse, delta, dq, row_tiles, key_base, bounds, item, rows, heads, scale_log2,
                             scale, shared, bars, DIM, STAGES, PREFIX)),
                (_consumer, (1, lse, delta, dq, row_tiles, key_base, bounds, item, rows, heads, scale_log2,
                             scale, shared, bars, DIM, STAGES, PREFIX)),
                (_producer, ((dq_in, ddout, dk, dv), row_tiles, item, rows, key_tokens, group, shared, bars,
                             KEYS, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
