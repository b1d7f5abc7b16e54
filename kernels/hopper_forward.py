"""Forward for Hopper in Gluon: a producer warp feeds two warpgroups of 64 queries each; exact for every plan.

Persistent: one program per multiprocessor walks a table of query tiles, longest first, the tiles of one
key/value head together. The producer warp reads the plan and issues TMA copies of queries, keys and
values; it runs ahead over the ends of query tiles, so the next keys arrive during the last store. Each
warpgroup has the product QK of a tile in flight during the softmax of the tile before it. Full tiles need
no mask; partial tiles compare key positions with the visible intervals.
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
from .hopper_schedule import work_table
from .triton_forward import LN2, LOG2E, intervals

QUERIES = 128  # of a program at a time, in two warpgroups
STAGES = {64: 4, 128: 2}  # of keys and values in shared memory, by padded head dim
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
LARGE = gl.constexpr(2**30)


def descriptor(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """TMA descriptor of a contiguous [..., D] tensor as a matrix; columns from D to width read as zero."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, width], TYPES[x.dtype])
    matrix = x.view(-1, x.shape[-1])
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, width], layout)


def readable(x: Tensor) -> Tensor:
    """x as TMA can read it: contiguous, from an address that divides by 16."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def padded(q: Tensor) -> int:
    """The head dim, filled up to what the kernels compute with."""
    return max(64, 1 << (q.shape[3] - 1).bit_length())


def check(q: Tensor, bound: BoundPlan, scale: float) -> None:
    """Errors for what these kernels cannot do."""
    advice = "use impl='triton' or 'reference'"
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        raise NotImplementedError(
            f"impl='hopper' runs on GPUs of compute capability 9, got {q.device}; {advice}"
        )
    if q.dtype not in TYPES:
        raise NotImplementedError(f"impl='hopper' has bf16 and fp16, got {q.dtype}; {advice}")
    if q.shape[3] > max(STAGES) or q.shape[3] % 8:
        raise NotImplementedError(
            f"impl='hopper' has head dims up to {max(STAGES)} that divide by 8, got {q.shape[3]}; {advice}"
        )
    if bound.block_size != QUERIES:
        raise NotImplementedError(f"impl='hopper' has blocks of {QUERIES}, got {bound.block_size}; {advice}")
    if not scale > 0:
        raise ValueError(f"impl='hopper' needs a scale > 0, got {scale}; use impl='reference'")


def forward_step(q, k, v, bound: BoundPlan, source: int, out, lse, scale: float, fresh: bool = False) -> None:
    """Attention over the tiles of one source; shapes are those of reference.py.

    fresh: out and lse carry nothing yet, whatever they hold; then out may be of q's dtype. Otherwise they
    are continued, and rows without tiles left alone.
    """
    check(q, bound, scale)
    table, live = work_table(bound, source, q.shape[1], k)
    width = padded(q)
    programs = min(table.shape[0], torch.cuda.get_device_properties(q.device).multi_processor_count)
    q, k, v = readable(q), readable(k), readable(v)
    with torch.cuda.device(q.device):
        _forward[(programs,)](
            descriptor(q, QUERIES // 2, width),
            descriptor(k, bound.block_size, width),
            descriptor(v, bound.block_size, width),
            descriptor(out if out.dtype == q.dtype else q, QUERIES // 2, width),
            out,
            lse,
            table,
            bound.row_tiles,
            bound.key_base[source * bound.blocks_per_source :],
            *intervals(bound),
            scale * LOG2E.value,
            live,
            table.shape[0],
            bound.rows,
            k.shape[2],
            q.shape[1],
            q.shape[1] // k.shape[1],
            programs,
            KEYS=bound.block_size,
            DIM=q.shape[3],
            WIDTH=width,
            STAGES=STAGES[width],
            PREFIX=bound.prefix_lo is not None,
            RESUME=not fresh,
            num_warps=4,
        )


@gluon.constexpr_function
def in_fours(width: int):
    """The layout of [64, width] sums whose threads hold four neighbours each: one swap within quads away."""
    wide = [[0, 2**i] for i in range(4, width.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], *wide],
        [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, width],
    )


@gluon.jit
def turns_of(items, programs):
    """How many items this program has: rounds go back and forth, so that all programs get equal sums."""
    rounds = (items + programs - 1) // programs
    return gl.where(place_of(rounds - 1, programs) < items, rounds, rounds - 1)


@gluon.jit
def place_of(turn, programs):
    """Where in the table the item of a turn stands."""
    p = gl.program_id(0)
    return turn * programs + gl.where(turn % 2 == 0, p, programs - 1 - p)


@gluon.jit
def _item(table, turn, items, programs):
    """(query tile, first entry, full tiles, tiles) of a turn; past the end, of some other one."""
    at = table + gl.minimum(place_of(turn, programs), items - 1) * 4
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)


@gluon.jit
def _producer(descriptors, plan, shared, bars, KEYS: gl.constexpr, STAGES: gl.constexpr):
    table, row_tiles, live, rows, key_tokens, group, programs = plan
    dq, dk, dv = descriptors
    queries, keys, values = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    HALF: gl.constexpr = queries.shape[1]
    items = gl.load(live)
    count = 0  # key tiles sent
    tile, begin, full, n = _item(table, 0, items, programs)
    for turn in range(0, turns_of(items, programs)):
        after = _item(table, turn + 1, items, programs)
        entry = row_tiles + begin
        slot = gl.load(entry)
        for part in gl.static_range(2):
            buffer = turn % 2 * 2 + part
            mbarrier.wait(q_empty.index(buffer), ((turn // 2) & 1) ^ 1)
            mbarrier.expect(q_full.index(buffer), dq.block_type.nbytes)
            at = tile * (2 * HALF) + part * HALF
            tma.async_copy_global_to_shared(dq, [at, 0], q_full.index(buffer), queries.index(buffer))
        first = tile // rows // group * key_tokens
        for i in range(0, n):
            stage = (count + i) % STAGES
            phase = (((count + i) // STAGES) & 1) ^ 1
            at = first + slot * KEYS
            slot = gl.load(entry + i + 1)
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), dk.block_type.nbytes)
            tma.async_copy_global_to_shared(dk, [at, 0], k_full.index(stage), keys.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), dv.block_type.nbytes)
            tma.async_copy_global_to_shared(dv, [at, 0], v_full.index(stage), values.index(stage))
        count += n
        tile, begin, full, n = after


@gluon.jit
def online_weights(s, peak, total, scale):
    """Online softmax in base 2: weights, decay of what came before, new peak and total."""
    new_peak = gl.maximum(peak, gl.max(s, 1) * scale)
    shift = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = gl.exp2(s * scale - shift[:, None])
    decay = gl.exp2(peak - shift)
    return weights, decay, new_peak, total * decay + gl.sum(weights, 1)


@gluon.jit
def _full_weights(s, peak, total, scale):
    """The same where every key is visible: the new peak is finite."""
    new_peak = gl.maximum(peak, gl.max(s, 1) * scale)
    weights = gl.exp2(s * scale - new_peak[:, None])
    decay = gl.exp2(peak - new_peak)
    return weights, decay, new_peak, total * decay + gl.sum(weights, 1)


@gluon.jit
def masked(s, base, low, high, prefix_low, prefix_high, PREFIX: gl.constexpr):
    """Scores of key positions base, base + 1, ... outside the visible intervals become -inf."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    at = gl.arange(0, s.shape[1], LAYOUT)[None, :]
    seen = (at >= (low - base)[:, None]) & (at <= (high - base)[:, None])
    if PREFIX:
        seen = seen | ((at >= (prefix_low - base)[:, None]) & (at <= (prefix_high - base)[:, None]))
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def visible_keys(bounds, tile, rows, heads, row, PREFIX: gl.constexpr):
    """lo, hi, prefix_lo, prefix_hi of the queries of a tile."""
    lo, hi, prefix_lo, prefix_hi = bounds
    query = (tile // rows // heads * rows + tile % rows) * 128 + row
    low, high = gl.load(lo + query), gl.load(hi + query)
    prefix_low, prefix_high = low, high
    if PREFIX:
        prefix_low, prefix_high = gl.load(prefix_lo + query), gl.load(prefix_hi + query)
    return low, high, prefix_low, prefix_high


@gluon.jit
def _first_mask(s, full, base, seen, PREFIX: gl.constexpr):
    """The mask of the first tile of a row, which masks nothing if the tile is full."""
    low, high, prefix_low, prefix_high = seen
    low = gl.where(full > 0, -LARGE, low)
    high = gl.where(full > 0, LARGE, high)
    return masked(s, gl.where(full > 0, 0, base), low, high, prefix_low, prefix_high, PREFIX)


@gluon.jit
def _consumer(
    PART: gl.constexpr,
    dout,
    out,
    lse,
    plan,
    scale,
    shared,
    bars,
    KEYS: gl.constexpr,
    DIM: gl.constexpr,
    WIDTH: gl.constexpr,
    STAGES: gl.constexpr,
    PREFIX: gl.constexpr,
    RESUME: gl.constexpr,
):
    table, row_tiles, key_base, bounds, live, items, rows, heads, programs = plan
    queries, keys, values = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    HALF: gl.constexpr = queries.shape[1]
    TYPE: gl.constexpr = queries.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROW: gl.constexpr = gl.SliceLayout(1, SUMS)
    zeros = gl.full([HALF, KEYS], 0.0, gl.float32, SCORES)
    none = gl.full([HALF], float("-inf"), gl.float32, ROW)
    row = gl.arange(0, HALF, ROW) + PART * HALF
    FOURS: gl.constexpr = in_fours(WIDTH)
    FOURS_ROW: gl.constexpr = gl.SliceLayout(1, FOURS)
    fours_row = gl.arange(0, HALF, FOURS_ROW) + PART * HALF
    fours_column = gl.arange(0, WIDTH, gl.SliceLayout(0, FOURS))
    number = gl.load(live)
    turns = turns_of(number, programs)
    if turns > 0:
        tile, begin, full, n = _item(table, 0, number, programs)
        next_tile, next_begin, next_full, next_n = _item(table, 1, number, programs)
        entry = row_tiles + begin + full
        base = gl.load(key_base + gl.load(entry))
        slot = gl.load(entry + 1)
        low, high, prefix_low, prefix_high = visible_keys(bounds, tile, rows, heads, row, PREFIX)
        count = 0  # key tiles consumed
        mbarrier.wait(q_full.index(PART), 0)
        mbarrier.wait(k_full.index(0), 0)
        q = queries.index(PART)
        token = warpgroup_mma(q, keys.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(k_empty.index(0), count=1)
        s = _first_mask(s, full, base, (low, high, prefix_low, prefix_high), PREFIX)
        weights, decay, peak, total = online_weights(s, none, gl.zeros_like(none), scale)
        operand = gl.convert_layout(weights.to(TYPE), OPERAND)
        for turn in range(0, turns):
            # Of the next query tiles: what is read here is used much later, so nothing waits for it.
            third_tile, third_begin, third_full, third_n = _item(table, turn + 2, number, programs)
            next_entry = row_tiles + next_begin + next_full
            next_slot = gl.load(next_entry)
            following = gl.load(next_entry + 1)
            if full == 0:  # the first tile was a partial one
                base = gl.load(key_base + slot)
                slot = gl.load(entry + 2)
            buffer = turn % 2 * 2 + PART
            q = queries.index(buffer)
            acc = gl.full([HALF, WIDTH], 0.0, gl.float32, SUMS)
            for i in range(1, full):
                before = (count + i - 1) % STAGES
                v_phase = ((count + i - 1) // STAGES) & 1
                stage = (count + i) % STAGES
                mbarrier.wait(k_full.index(stage), ((count + i) // STAGES) & 1)
                token = warpgroup_mma(
                    q, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
                )
                mbarrier.wait(v_full.index(before), v_phase)
                sums = warpgroup_mma(operand, values.index(before), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=[token])
                mbarrier.arrive(k_empty.index(stage), count=1)
                weights, decay, peak, total = _full_weights(s, peak, total, scale)
                acc = warpgroup_mma_wait(0, deps=[sums])
                mbarrier.arrive(v_empty.index(before), count=1)
                acc = acc * gl.convert_layout(decay, OUT_ROW)[:, None]
                operand = gl.convert_layout(weights.to(TYPE), OPERAND)
            if out.dtype.element_ty == TYPE:  # the last query tile has left its buffer by now
                tma.store_wait(0)
                mbarrier.arrive(q_empty.index(2 - 2 * (turn % 2) + PART), count=1, pred=turn > 0)
            next_base = gl.load(key_base + next_slot)
            seen = visible_keys(bounds, next_tile, rows, heads, row, PREFIX)
            for i in range(gl.maximum(full, 1), n):
                before = (count + i - 1) % STAGES
                v_phase = ((count + i - 1) // STAGES) & 1
                stage = (count + i) % STAGES
                mbarrier.wait(k_full.index(stage), ((count + i) // STAGES) & 1)
                token = warpgroup_mma(
                    q, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
                )
                mbarrier.wait(v_full.index(before), v_phase)
                sums = warpgroup_mma(operand, values.index(before), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=[token])
                mbarrier.arrive(k_empty.index(stage), count=1)
                s = masked(s, base, low, high, prefix_low, prefix_high, PREFIX)
                base = gl.load(key_base + slot)
                slot = gl.load(entry + (i - full) + 2)
                weights, decay, peak, total = online_weights(s, peak, total, scale)
                acc = warpgroup_mma_wait(0, deps=[sums])
                mbarrier.arrive(v_empty.index(before), count=1)
                acc = acc * gl.convert_layout(decay, OUT_ROW)[:, None]
                operand = gl.convert_layout(weights.to(TYPE), OPERAND)
            # The first scores of the next query tile run with the last sums of this one.
            more = turn + 1 < turns
            # This use of n matters: Triton 3.6 takes a carried value for constant if it only bounds loops.
            count += n
            before = (count - 1) % STAGES
            v_phase = ((count - 1) // STAGES) & 1
            stage = count % STAGES
            next_buffer = (turn + 1) % 2 * 2 + PART
            mbarrier.wait(q_full.index(next_buffer), ((turn + 1) // 2) & 1, pred=more)
            mbarrier.wait(k_full.index(stage), (count // STAGES) & 1, pred=more)
            next_q = queries.index(next_buffer)
            token = warpgroup_mma(
                next_q, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            mbarrier.wait(v_full.index(before), v_phase)
            sums = warpgroup_mma(operand, values.index(before), acc, is_async=True)
            first = tile.to(gl.int64) * (2 * HALF)
            state = lse + first + row
            total = gl.where(total == 0.0, 1.0, total)  # peak is -inf there
            share = 1.0 / total
            peak += gl.log2(total)
            if RESUME:
                carried = gl.load(state) * LOG2E
                top = gl.maximum(carried, peak)
                shift = gl.where(top == float("-inf"), 0.0, top)
                kept = gl.exp2(carried - shift)
                added = gl.exp2(peak - shift)
                both = gl.where(top == float("-inf"), 1.0, kept + added)
                share *= added / both
                peak = top + gl.log2(both)
            gl.store(state, peak * LN2)
            s = warpgroup_mma_wait(1, deps=[token])
            mbarrier.arrive(k_empty.index(stage), count=1, pred=more)
            s = _first_mask(s, next_full, next_base, seen, PREFIX)
            weights, decay, peak, total = online_weights(s, none, gl.zeros_like(none), scale)
            acc = warpgroup_mma_wait(0, deps=[sums])
            mbarrier.arrive(v_empty.index(before), count=1)
            operand = gl.convert_layout(weights.to(TYPE), OPERAND)
            acc = acc * gl.convert_layout(share, OUT_ROW)[:, None]
            if out.dtype.element_ty == TYPE:  # through the buffer of the queries, done with by now
                q.store(acc.to(TYPE))
                fence_async_shared()
                gl.thread_barrier()
                tma.async_copy_shared_to_global(dout, [tile * (2 * HALF) + PART * HALF, 0], q)
            else:
                x = gl.convert_layout(acc, FOURS)
                target = out + (first + fours_row)[:, None] * DIM + fours_column[None, :]
                inside = (fours_column < DIM)[None, :]
                if RESUME:
                    part = gl.convert_layout(kept / both, FOURS_ROW)[:, None]
                    known = (part > 0.0) & inside  # what saw nothing is not read
                    x += gl.load(target, mask=known, other=0.0) * part
                gl.store(target, x, mask=inside)
                mbarrier.arrive(q_empty.index(buffer), count=1)
            tile = next_tile
            full = next_full
            n = next_n
            entry = next_entry
            base = next_base
            slot = following
            low, high, prefix_low, prefix_high = seen
            next_tile = third_tile
            next_begin = third_begin
            next_full = third_full
            next_n = third_n
    if out.dtype.element_ty == TYPE:
        tma.store_wait(0)
    if not RESUME:  # rows without tiles stand at the end of the table
        empty = gl.full([HALF, WIDTH], 0.0, out.dtype.element_ty, FOURS)
        for place in range(number + gl.program_id(0), items, programs):
            first = gl.load(table + place * 4).to(gl.int64) * (2 * HALF)
            gl.store(lse + first + row, none)
            target = out + (first + fours_row)[:, None] * DIM + fours_column[None, :]
            gl.store(target, empty, mask=(fours_column < DIM)[None, :])


@gluon.jit(do_not_specialize=["items", "rows", "key_tokens", "heads", "group", "programs"])
def _forward(
    dq, dk, dv, dout, out, lse, table, row_tiles, key_base, lo, hi, prefix_lo, prefix_hi, scale, live, items,
    rows, key_tokens, heads, group, programs, KEYS: gl.constexpr, DIM: gl.constexpr, WIDTH: gl.constexpr,
    STAGES: gl.constexpr, PREFIX: gl.constexpr, RESUME: gl.constexpr,
):  # fmt: skip
    queries = gl.allocate_shared_memory(dq.dtype, [4, dq.block_shape[0], WIDTH], dq.layout)
    keys = gl.allocate_shared_memory(dk.dtype, [STAGES, KEYS, WIDTH], dk.layout)
    values = gl.allocate_shared_memory(dv.dtype, [STAGES, KEYS, WIDTH], dv.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(4):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    shared = (queries, keys, values)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    bounds = (lo, hi, prefix_lo, prefix_hi)
    plan = (table, row_tiles, key_base, bounds, live, items, rows, heads, programs)
    copies = (table, row_tiles, live, rows, key_tokens, group, programs)
    gl.warp_specialize(
        [
            (
                _consumer,
                (0, dout, out, lse, plan, scale, shared, bars, KEYS, DIM, WIDTH, STAGES, PREFIX, RESUME),
            ),
            (
                _consumer,
                (1, dout, out, lse, plan, scale, shared, bars, KEYS, DIM, WIDTH, STAGES, PREFIX, RESUME),
            ),
            (_producer, ((dq, dk, dv), copies, shared, bars, KEYS, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
