"""The order in which the Hopper kernels take the query tiles, and the key blocks, of a plan.

Tables are made for all sources at once, on the device without synchronisation, and kept with the bound
plan: a ring step only picks its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bound import BoundPlan
from .triton_order import columns_in_order, longest_first, rows_in_order

SHORT = 16  # tiles: shorter lists are not worth a part
NEAR = 24 * 2**20  # bytes of keys and values that the L2 of a Hopper GPU keeps beside all else


def work_table(bound: BoundPlan, source: int, heads: int, k: Tensor) -> tuple[Tensor, Tensor]:
    """int32 [items, 4] = (query tile, first entry, full tiles, tiles), and int32 [1], how many have tiles.

    k: the keys [B, Hk, n, D] of the source. Longest first, but for one group of key heads after the other,
    of as many as fit into the L2 together: what is dealt out evenly is only what is in one order. Those
    without tiles at the very end. Query tiles are numbered (batch, head, row).
    """
    groups = groups_of(k.shape[0] * k.shape[1], 2 * k.shape[2] * k.shape[3] * k.itemsize)
    tables, live = bound.memo(("rows", heads, groups), lambda: _rows(bound, heads, groups))
    return tables[source], live[source]


def groups_of(kv_heads: int, size: int) -> int:
    """Into how many equal groups key heads of `size` bytes each are put, so that a group is near enough."""
    fitting = max(1, NEAR // size)
    return min(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and kv_heads // n <= fitting)


def column_table(
    bound: BoundPlan, source: int, heads: int, kv_heads: int, split: bool
) -> tuple[Tensor, Tensor]:
    """int32 [items, 4] = (key head, slot, part, parts), and int32 [1], how many are used.

    One key head, counted over the batch, after the other, its longest lists first; key blocks without tiles
    do not occur. split: a list that would keep a multiprocessor busy for long is cut into parts.
    """
    tables, live = bound.memo(("columns", kv_heads, split), lambda: _columns(bound, kv_heads, split))
    return tables[source], live[source]


def _rows(bound: BoundPlan, heads: int, groups: int) -> tuple[Tensor, Tensor]:
    batch, mask_heads, rows = bound.plan.geometry.batch, bound.mask_heads, bound.rows
    tiles = bound.row_ptr.diff().view(batch, mask_heads, rows, bound.num_sources).permute(3, 0, 1, 2)
    tiles = tiles.repeat_interleave(heads // mask_heads, 2)
    tiles = tiles.reshape(bound.num_sources, groups, -1)
    table = rows_in_order(bound, longest_first(tiles, bound.blocks_per_source), heads)
    return table, (tiles > 0).sum((1, 2), dtype=torch.int32)[:, None]


def _columns(bound: BoundPlan, kv_heads: int, split: bool) -> tuple[Tensor, Tensor]:
    batch, mask_heads, slots = bound.plan.geometry.batch, bound.mask_heads, bound.blocks_per_source
    shape = (batch, mask_heads, bound.num_sources, slots)
    tiles = (bound.key_ptr[1:] - bound.key_ptr[:-1]).view(shape)
    if mask_heads > kv_heads:
        tiles = tiles.unflatten(1, (kv_heads, -1)).sum(2, dtype=torch.int32)
    tiles = tiles.repeat_interleave(-(-kv_heads // mask_heads), 1)
    tiles = tiles.permute(2, 0, 1, 3).flatten(1, 2)  # [sources, key heads, slots]
    order = longest_first(tiles, bound.rows * max(1, mask_heads // kv_heads))
    shares = 8 * torch.cuda.get_device_properties(tiles.device).multi_processor_count if split else 0
    return columns_in_order(tiles.flatten(1), order, slots, shares, SHORT)
