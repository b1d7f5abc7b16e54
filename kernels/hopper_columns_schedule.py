"""Which columns the Hopper kernels compute for which queries: tables made on the device, kept with a plan.

The columns of a row are an index range [begin, end) of the sorted ones. A query tile walks it in tiles of
128 from its end; a tile of 128 columns has a list of the rows that may see some of it. Both know where no
interval needs to be compared, because every query of the row sees every column: what is left to look at
is whether the column lies in a chosen tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bound import BoundPlan, columns_before
from .columns import column_heads
from .triton_order import longest_first

SIZE = 128  # queries of a row, and columns of a tile


def row_table(bound: BoundPlan, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """int32 [query tiles, 8], those with most columns first by key head, and int32 [1], how many have any.

    (query tile, begin, end, tiles above the clear ones, clear tiles, segment of keys, list of columns, row
    of the bitmask). Query tiles are numbered (batch, head, row), segments (batch, buffer head, group).
    """
    return bound.memo(("column rows", heads, kv_heads), lambda: _row_table(bound, heads, kv_heads))


def row_lists(bound: BoundPlan) -> tuple[Tensor, Tensor]:
    """int32 [lists, rows + 1] and int32 [lists, 2], how many of these are clear rows, and rows at all.

    Lists are numbered (batch, column head, group, tile), clear rows come first. One entry behind the last is
    readable.
    """
    return bound.memo("column lists", lambda: _row_lists(bound))


def _row_table(bound: BoundPlan, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    batch, rows, groups = bound.lo.shape[0], bound.rows, bound.columns.shape[2]
    device, buffers = bound.columns.device, column_heads(bound.plan, kv_heads)
    begin, end, clear_begin, clear_end = (_by_head(x, heads) for x in _ranges(bound))
    count = _tiles(end - begin)
    above = _tiles(end - clear_end)
    below = torch.where(clear_begin <= begin, count, (end - clear_begin).clamp(min=0) // SIZE)
    clear = (below.minimum(count) - above).clamp(min=0)
    tile = torch.arange(batch * heads * rows, dtype=torch.int32, device=device).view(batch, heads, rows)
    batches = torch.arange(batch, dtype=torch.int32, device=device)[:, None, None]
    head = torch.arange(heads, dtype=torch.int32, device=device)[:, None]
    group = 0 if bound.column_group is None else bound.column_group.int()

    def of(number: int) -> Tensor:
        """Number of the head, of `number` ones, that serves each query head; counted over the batch."""
        return batches * number + head * number // heads

    segment = of(buffers) * groups + group
    columns = of(bound.columns.shape[1]) * groups + group
    bits = of(bound.mask_heads) * rows + torch.arange(rows, dtype=torch.int32, device=device)
    fields = torch.broadcast_tensors(tile, begin, end, above, clear, segment, columns, bits)
    order = longest_first(count.view(1, batch * buffers, -1), -(-bound.columns.shape[3] // SIZE))
    table = torch.stack(fields, 3).view(-1, 8)[order[0]]
    return table, (count > 0).sum(dtype=torch.int32)[None]


def _row_lists(bound: BoundPlan) -> tuple[Tensor, Tensor]:
    rows, (groups, columns) = bound.rows, bound.columns.shape[2:]
    first = torch.arange(0, columns, SIZE, dtype=torch.int32, device=bound.columns.device)[:, None]
    last = (first + SIZE).clamp(max=columns)
    begin, end, clear_begin, clear_end = (x[:, :, None, None] for x in _ranges(bound))
    used = (begin < last) & (end > first)  # [B, Hc, groups, tiles, rows]
    if bound.column_group is not None:
        used = used & (bound.column_group == torch.arange(groups, device=used.device)[:, None])[:, None]
    clear = used & (clear_begin <= first) & (clear_end >= last)
    clear, used = clear.flatten(0, 3), used.flatten(0, 3)
    sizes = torch.stack((clear.sum(1, dtype=torch.int32), used.sum(1, dtype=torch.int32)), 1)
    rank = clear.cumsum(1, dtype=torch.int32)
    others = sizes[:, :1] + used.cumsum(1, dtype=torch.int32) - rank
    place = torch.where(used, torch.where(clear, rank, others) - 1, rows)  # a dump slot at the end
    entries = torch.zeros(len(used), rows + 1, dtype=torch.int32, device=used.device)
    row = torch.arange(rows, dtype=torch.int32, device=used.device)
    entries.scatter_(1, place.long(), row.expand_as(place))
    return entries, sizes


def _ranges(bound: BoundPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int32 [B, Hc, rows]: columns that some query of a row may see, and those that every query sees."""
    low = bound.lo.unflatten(1, (bound.rows, SIZE)).amax(2)
    high = bound.hi.unflatten(1, (bound.rows, SIZE)).amin(2)
    columns = bound.columns, bound.column_group
    clear = columns_before(*columns, low), columns_before(*columns, high, right=True)
    return bound.column_begin, bound.column_end, *clear


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def _tiles(columns: Tensor) -> Tensor:
    """How many tiles hold so many columns."""
    return (columns.clamp(min=0) + SIZE - 1) // SIZE
