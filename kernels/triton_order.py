"""Longest first: a stable counting sort of work items by Triton kernels, the same order on every run.

Chunks of CHUNK items are ranked inside, among items of equal length, by comparing all pairs. The numbers of
items by (table, group, length, chunk), summed up in this order, say where those of a chunk begin. Four
launches, where sorting by keys takes a dozen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import BoundPlan
from .triton_forward import launch

CHUNK = 128
COUNTS = [
    "lists",
    "shares",
    "short",
    "slots",
    "groups",
    "items",
    "chunks",
    "longest",
    "sources",
    "rows",
    "heads",
    "mask_heads",
]


def longest_first(lengths: Tensor, longest: int) -> Tensor:
    """int64 [tables, groups * items]: the order of the items of each table, numbered over its groups.

    lengths: int32 [tables, groups, items], 0 to `longest`. One group after the other, in each the longest
    items first, of equal ones the first first; those of length 0 at the very end of the table.
    """
    tables, groups, items = lengths.shape
    chunks = triton.cdiv(items, CHUNK)
    order = torch.empty(tables, groups * items, dtype=torch.int64, device=lengths.device)
    size = tables * groups * (longest + 1) * chunks
    count = torch.zeros(size, dtype=torch.int32, device=lengths.device)
    arguments = (lengths.contiguous(), count, order, groups, items, chunks, longest)
    launch(_sort, tables * groups * chunks, lengths, arguments, PLACE=False, CHUNK=CHUNK)
    torch.cumsum(count, 0, dtype=torch.int32, out=count)
    launch(_sort, tables * groups * chunks, lengths, arguments, PLACE=True, CHUNK=CHUNK)
    return order


def rows_in_order(bound: BoundPlan, order: Tensor, heads: int) -> Tensor:
    """int32 [sources, items, 4] = (query tile, first entry, full tiles, tiles), from the lists by row.

    order: int64 [sources, items], query tiles, numbered (batch, head, row), as longest_first puts them.
    """
    sources, items = order.shape
    table = torch.empty(sources, items, 4, dtype=torch.int32, device=order.device)
    arguments = (order, bound.row_ptr, bound.row_full, table, items, sources, bound.rows, heads)
    programs = triton.cdiv(sources * items, CHUNK)
    launch(_rows, programs, order, (*arguments, bound.mask_heads), CHUNK=CHUNK)
    return table


def columns_in_order(tiles: Tensor, order: Tensor, slots: int, shares: int, short: int):
    """int32 [sources, items, 4] = (key head, slot, part, parts), and int32 [sources, 1], how many are used.

    tiles: int32 [sources, key heads * slots], tiles of each list; order: int64, alike, from longest_first.
    shares: into how many parts all tiles of a source are cut at most, beside the lists that stay whole; a
    part has about 1 / shares of them, and at least `short`. 0: no list is cut.
    """
    sources, lists = tiles.shape
    totals = tiles.sum(1, dtype=torch.int32)
    end = torch.empty_like(tiles)
    arguments = (tiles, order, totals, end, lists, shares, short)
    launch(_parts, sources * triton.cdiv(lists, CHUNK), tiles, arguments, CHUNK=CHUNK)
    torch.cumsum(end, 1, dtype=torch.int32, out=end)
    items = lists + shares
    table = torch.empty(sources, items, 4, dtype=torch.int32, device=tiles.device)
    arguments = (order, end, table, lists, items, slots)
    launch(_columns, sources * triton.cdiv(items, CHUNK), tiles, arguments, CHUNK=CHUNK)
    return table, end[:, -1:]


@triton.jit(do_not_specialize=COUNTS)
def _parts(tiles, order, totals, parts, lists, shares, short, CHUNK: tl.constexpr):
    """How many parts the lists are cut into, in order."""
    chunks = tl.cdiv(lists, CHUNK)
    source = tl.program_id(0) // chunks
    place = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    there = place < lists
    at = tl.load(order + source * lists + place, mask=there, other=0)
    count = tl.load(tiles + source * lists + at, mask=there, other=0)
    result = tl.minimum(count, 1)
    if shares > 0:
        longest = tl.maximum(tl.load(totals + source) // shares, short)
        result = tl.where(count > 0, tl.maximum((count + longest // 2) // longest, 1), 0)
    tl.store(parts + source * lists + place, result, mask=there)


@triton.jit(do_not_specialize=COUNTS)
def _columns(order, end, table, lists, items, slots, CHUNK: tl.constexpr):
    """Finds the list of every item by bisection of `end`, the parts of all lists so far."""
    chunks = tl.cdiv(items, CHUNK)
    source = tl.program_id(0) // chunks
    item = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    order += source * lists
    end += source * lists
    low, high = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int32) + lists - 1
    left = lists
    while left > 1:
        middle = (low + high) // 2
        beyond = tl.load(end + middle) <= item
        low, high = tl.where(beyond, tl.minimum(middle + 1, high), low), tl.where(beyond, high, middle)
        left = (left + 1) // 2
    at = tl.load(order + low).to(tl.int32)
    last = tl.load(end + low)
    before = tl.load(end + low - 1, mask=low > 0, other=0)
    place = table + (source * items + item).to(tl.int64) * 4
    tl.store(place, at // slots, mask=item < items)
    tl.store(place + 1, at % slots, mask=item < items)
    tl.store(place + 2, item - before, mask=item < items)
    tl.store(place + 3, last - before, mask=item < items)


@triton.jit(do_not_specialize=COUNTS)
def _sort(lengths, count, order, groups, items, chunks, longest, PLACE: tl.constexpr, CHUNK: tl.constexpr):
    """Counts the items of a chunk by length; PLACE: puts them where the sums of all counts say."""
    group, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    lengths += group * items
    table, group = group // groups, group % groups
    place = tl.arange(0, CHUNK)
    item = chunk * CHUNK + place
    mine = tl.load(lengths + item, mask=item < items, other=-1)
    others = tl.load(lengths + item, mask=item < items, other=-1)[:, None]
    before = place[:, None] < place[None, :]
    # Two sums in one: equal items in the lower half, equal ones before in the upper.
    both = tl.sum(tl.where(others == mine[None, :], tl.where(before, 0x10001, 1), 0), 0)
    total, rank = both & 0xFFFF, both >> 16
    line = tl.where(mine > 0, group * longest + longest - mine, groups * longest + group)
    cell = count + (table * groups * (longest + 1) + line).to(tl.int64) * chunks + chunk
    if PLACE:
        end = tl.load(cell, mask=item < items, other=0)
        tl.store(order + end - total + rank, group * items + item, mask=item < items)
    else:
        tl.store(cell, total, mask=(item < items) & (rank == 0))


@triton.jit(do_not_specialize=COUNTS)
def _rows(order, row_ptr, row_full, table, items, sources, rows, heads, mask_heads, CHUNK: tl.constexpr):
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    there = at < sources * items
    tile = tl.load(order + at, mask=there, other=0).to(tl.int32)
    mask_head = tile // rows // heads * mask_heads + tile // rows % heads * mask_heads // heads
    x = (mask_head * rows + tile % rows) * sources + at // items
    begin = tl.load(row_ptr + x, mask=there, other=0)
    tl.store(table + at * 4, tile, mask=there)
    tl.store(table + at * 4 + 1, begin, mask=there)
    tl.store(table + at * 4 + 2, tl.load(row_full + x, mask=there, other=0), mask=there)
    tl.store(table + at * 4 + 3, tl.load(row_ptr + x + 1, mask=there, other=0) - begin, mask=there)
