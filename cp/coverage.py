"""Do queries see the keys that their plan promises? Counted by the very ring and kernels that attend.

With q = 0 every score is 0, so lse = ln(number of keys that took part): a tile, column or source that is
lost, repeated or masked wrongly anywhere between the plan and the kernels shows as a wrong count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.bound import BoundPlan
from ..kernels.plan import Plan
from .heads import sharded_attention
from .ring import Ring
from .transport import Transport

# lse is a logarithm in fp32: counts are exact up to about 100,000 keys a query, then right to this share.
RESOLUTION = 2.0**-16


@torch.no_grad()
def count_keys(q: Tensor, k: Tensor, v: Tensor, bound: BoundPlan, ring: Ring, scale: float) -> Tensor:
    """int64 [3]: pairs of query and key seen, pairs that the plan promised, rows that differ.

    A row is one head of one query block.
    Arguments as of sharded_attention; costs one more forward. Does not synchronise.
    """
    uncounted = replace(ring, sent=Counter())
    q, k = torch.zeros_like(q), torch.zeros_like(k)  # keys too: 0 times infinity is not 0
    lse = sharded_attention(q, k, v, bound, uncounted, scale)[1]
    size = bound.plan.geometry.block_size
    seen = lse.double().exp().round().long().unflatten(2, (-1, size)).sum(3)
    promised = _promised(bound.plan, q.shape[1])
    differ = (seen - promised).abs() > promised * RESOLUTION
    return torch.stack((seen.sum(), promised.sum(), differ.sum()))


def _promised(plan: Plan, heads: int) -> Tensor:
    """int64 [B, heads, held blocks]: visible pairs in chosen tiles and in columns outside them."""
    tiles = plan.tiles_bool()
    pairs = (tiles * plan.geometry.visible_elements[:, None]).sum(3, dtype=torch.int64)
    pairs = pairs.repeat_interleave(heads // pairs.shape[1], 1)
    if plan.columns is not None:
        outside = plan.column_elements().sum(3, dtype=torch.int64)
        pairs += outside.repeat_interleave(heads // outside.shape[1], 1)
    return pairs


def check_keys(counts: dict[Hashable, list[Tensor]], transport: Transport) -> None:
    """Raises RuntimeError on every rank if any query of any layer saw other keys than were promised.

    counts: what count_keys returned, for each layer each time it ran; empty where nothing was counted.
    Synchronises; all ranks call it.
    """
    if not counts:
        return
    total = torch.stack([x for runs in counts.values() for x in runs]).sum(0)
    transport.all_reduce(total).wait()
    seen, promised, differ = total.tolist()
    if differ:
        layers = [layer for layer, runs in counts.items() if sum(int(x[2]) for x in runs)]
        raise RuntimeError(
            f"queries saw {seen} keys in all where their plans promise {promised}: {differ} rows of (head, "
            f"query block) differ over all ranks, on rank {transport.rank} in layers {layers}; try "
            "impl='reference' or debug=True, and report it"
        )
