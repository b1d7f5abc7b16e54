"""Counts of what columns add to tiles, for every head and query block, without a list of all their pairs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import BoundPlan
from .triton_columns import lists_of, outside_tiles
from .triton_forward import COUNTS, INTERPRET, launch, query_intervals, visible


def column_counts(bound: BoundPlan) -> Tensor:
    """int64 [2, B, max(Hm, Hc), M], as columns.py defines them."""
    heads, column_heads = max(bound.mask_heads, bound.columns.shape[1]), bound.columns.shape[1]
    counts = torch.empty(2, len(bound.lo), heads, bound.rows, dtype=torch.int64, device=bound.columns.device)
    groups, count = bound.columns.shape[2:]
    sizes = (bound.rows, groups, count, bound.tiles.shape[3], heads, bound.mask_heads, column_heads)
    meta = dict(GROUPED=bound.column_group is not None, PREFIX=bound.prefix_lo is not None)
    launch(
        _counts,
        counts[0].numel(),
        counts,
        (*counts, *lists_of(bound), *sizes),
        **meta,
        BLOCK=bound.block_size,
        KEYS=512 if INTERPRET else 64,  # the interpreter is slow by the operation
    )
    return counts


@triton.jit(do_not_specialize=COUNTS)
def _counts(
    pairs,
    used,
    tiles,
    columns,
    column_group,
    column_begin,
    column_end,
    lo,
    hi,
    prefix_lo,
    prefix_hi,
    rows,
    groups,
    count,
    words,
    heads,
    mask_heads,
    column_heads,
    GROUPED: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):
    pid = tl.program_id(0)
    row, batch, head = pid % rows, pid // rows // heads, pid // rows % heads
    column_head = batch * column_heads + head * column_heads // heads
    mask_head = batch * mask_heads + head * mask_heads // heads
    begin = tl.load(column_begin + column_head * rows + row)
    end = tl.load(column_end + column_head * rows + row)
    group = 0
    if GROUPED:
        group = tl.load(column_group + row)
    columns += (column_head.to(tl.int64) * groups + group) * count
    tiles += (mask_head.to(tl.int64) * rows + row) * words
    low, high, prefix_low, prefix_high = query_intervals(
        lo, hi, prefix_lo, prefix_hi, (batch * rows + row).to(tl.int64) * BLOCK, BLOCK, PREFIX
    )
    clear_from, clear_to = tl.max(low), tl.min(high)  # what lies between is seen by every query
    total, columns_used = tl.zeros([KEYS], dtype=tl.int32), tl.zeros([KEYS], dtype=tl.int32)
    for first in range(begin, end, KEYS):
        kept = tl.arange(0, KEYS) < end - first
        position = tl.load(columns + first + tl.arange(0, KEYS), mask=kept, other=0)
        kept = outside_tiles(tiles, position, kept, BLOCK)
        clear = (position >= clear_from) & (position <= clear_to)
        seen = BLOCK * clear.to(tl.int32)
        if tl.max((kept & ~clear).to(tl.int32)) > 0:
            each = visible(position[None, :], low, high, prefix_low, prefix_high, PREFIX)
            seen = tl.sum(each.to(tl.int32), 0)
        seen = tl.where(kept, seen, 0)
        total += seen
        columns_used += (seen > 0).to(tl.int32)
    tl.store(pairs + pid, tl.sum(total.to(tl.int64)))
    tl.store(used + pid, tl.sum(columns_used.to(tl.int64)))
