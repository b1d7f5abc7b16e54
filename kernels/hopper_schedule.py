"""The order in which the persistent Hopper kernels walk the query tiles of a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from .bound import BoundPlan

LAST = 2**30  # sorts behind every tile


def work_table(bound: BoundPlan, source: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """int32 [items, 4] = (query tile, first entry, full tiles, tiles), and int32 [1], how many have tiles.

    One key head after the other, longest first; those without tiles at the very end. Query tiles are
    numbered (batch, head, row). Built on the device without synchronisation.
    """
    batch, mask_heads, rows = bound.plan.geometry.batch, bound.mask_heads, bound.rows
    shape = (batch, mask_heads, rows, bound.num_sources)
    begin, end, full = (
        x.view(shape)[..., source].repeat_interleave(heads // mask_heads, 1).flatten()
        for x in (bound.row_ptr[:-1], bound.row_ptr[1:], bound.row_full)
    )
    tile = torch.arange(begin.numel(), dtype=torch.int32, device=begin.device)
    n = end - begin
    group = tile // (heads // kv_heads * rows)
    key = torch.where(n > 0, group * (bound.blocks_per_source + 1) - n, LAST)
    order = key.argsort(stable=True)
    return torch.stack((tile, begin, full, n), -1)[order], (n > 0).sum(dtype=torch.int32).view(1)
