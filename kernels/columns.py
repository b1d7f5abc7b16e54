"""Keys and values of columns: gathered from the holder's blocks, their gradients scattered back."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from .bound import BoundPlan, on_gpu
from .plan import Plan


def column_heads(plan: Plan, kv_heads: int) -> int:
    """Heads Hb of a gathered column buffer: one for every (column head, key head) pair that occurs."""
    return max(plan.columns.shape[1], kv_heads)


def gather_columns(k: Tensor, plan: Plan, blocks: Tensor | None = None) -> Tensor:
    """[B, Hk, held tokens, D] -> [B, Hb, groups, C, D]; columns not held here give exact zeros.

    Summing the results of all holders therefore gives the columns of the whole sequence. blocks: int64, those
    of k, in order; by default the query blocks of the plan.
    """
    index, held = _index(plan, k.shape[1], blocks)
    if not k.shape[2]:
        return k.new_zeros(*index.shape, k.shape[3])
    shared = index.unflatten(1, (k.shape[1], -1)).flatten(2)[..., None]  # by key head
    picked = torch.gather(k, 2, shared.expand(-1, -1, -1, k.shape[3]))
    return picked.view(*index.shape, -1) * held[..., None]


def scatter_columns(dcolumns: Tensor, plan: Plan, dk: Tensor, blocks: Tensor | None = None) -> None:
    """Adds gradients [B, Hb, groups, C, D] of columns held here to dk [B, Hk, held tokens, D] of the blocks.

    Columns are unique within one (head, group), and these are added one after the other: deterministic.
    """
    if not dk.shape[2]:
        return
    index, held = _index(plan, dk.shape[1], blocks)
    dcolumns = dcolumns * held[..., None]
    shared = index.shape[1] // dk.shape[1]
    for member in range(shared):
        for group in range(index.shape[2]):
            places = index[:, member::shared, group][..., None].expand(-1, -1, -1, dk.shape[3])
            dk.scatter_add_(2, places, dcolumns[:, member::shared, group])


def column_counts(bound: BoundPlan) -> Tensor:
    """int64 [2, B, max(Hm, Hc), M] of a plan with columns: for each query block the visible pairs in columns
    outside its chosen tiles, and how many such columns have any.
    """
    if on_gpu(bound.plan.geometry):
        return importlib.import_module(".triton_column_counts", __package__).column_counts(bound)
    outside = bound.plan.column_elements()
    return torch.stack((outside.sum(3, dtype=torch.int64), (outside > 0).sum(3)))


def _index(plan: Plan, kv_heads: int, blocks: Tensor | None) -> tuple[Tensor, Tensor]:
    """int64 and bool [B, Hb, groups, C]: physical token of each column, and whether it is held here."""
    geometry = plan.geometry
    slot = torch.full((geometry.num_blocks + 1,), -1, dtype=torch.int64, device=plan.tiles.device)
    blocks = geometry.block_ids if blocks is None else blocks
    slot[blocks] = torch.arange(len(blocks), device=slot.device)
    columns = plan.columns.long()
    columns = columns.repeat_interleave(column_heads(plan, kv_heads) // columns.shape[1], 1)
    place = slot[columns // geometry.block_size]  # padding columns fall on the last entry, -1
    token = place * geometry.block_size + columns % geometry.block_size
    return token.clamp(min=0), place >= 0
