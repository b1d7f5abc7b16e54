"""Keys and values of columns: gathered from the holder's blocks, their gradients scattered back."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Plan


def column_heads(plan: Plan, kv_heads: int) -> int:
    """Heads Hb of a gathered column buffer: one for every (column head, key head) pair that occurs."""
    return max(plan.columns.shape[1], kv_heads)


def gather_columns(k: Tensor, plan: Plan) -> Tensor:
    """[B, Hk, held tokens, D] -> [B, Hb, groups, C, D]; columns not held here give exact zeros.

    Summing the results of all holders therefore gives the columns of the whole sequence.
    """
    index, held = _index(plan, k.shape[1])
    if not plan.geometry.blocks:
        return k.new_zeros(*index.shape, k.shape[3])
    shared = index.unflatten(1, (k.shape[1], -1)).flatten(2)[..., None]  # by key head
    picked = torch.gather(k, 2, shared.expand(-1, -1, -1, k.shape[3]))
    return picked.view(*index.shape, -1) * held[..., None]


def scatter_columns(dcolumns: Tensor, plan: Plan, dk: Tensor) -> None:
    """Adds gradients [B, Hb, groups, C, D] of columns held here to dk [B, Hk, held tokens, D].

    Columns are unique within one (head, group), and these are added one after the other: deterministic.
    """
    if not plan.geometry.blocks:
        return
    index, held = _index(plan, dk.shape[1])
    dcolumns = dcolumns * held[..., None]
    shared = index.shape[1] // dk.shape[1]
    for member in range(shared):
        for group in range(index.shape[2]):
            places = index[:, member::shared, group][..., None].expand(-1, -1, -1, dk.shape[3])
            dk.scatter_add_(2, places, dcolumns[:, member::shared, group])


def _index(plan: Plan, kv_heads: int) -> tuple[Tensor, Tensor]:
    """int64 and bool [B, Hb, groups, C]: physical token of each column, and whether it is held here."""
    geometry = plan.geometry
    slot = torch.full((geometry.num_blocks + 1,), -1, dtype=torch.int64, device=plan.tiles.device)
    slot[geometry.block_ids] = torch.arange(len(geometry.blocks), device=slot.device)
    columns = plan.columns.long()
    columns = columns.repeat_interleave(column_heads(plan, kv_heads) // columns.shape[1], 1)
    place = slot[columns // geometry.block_size]  # padding columns fall on the last entry, -1
    token = place * geometry.block_size + columns % geometry.block_size
    return token.clamp(min=0), place >= 0
