"""What plans make ranks get from each other, counted tile by tile."""

from __future__ import annotations

from sparring.balance import Layout
from sparring.kernels import Plan


def remote_blocks(plan: Plan, layout: Layout, heads: int, kv_heads: int) -> int:
    """Blocks of key heads that live on another rank than a query block whose tiles touch them.

    plan: of the whole sequence. A block that several ranks need counts for each of them.
    """
    needed = set()
    width = heads // plan.mask_heads  # query heads of a mask
    for b, head, query, key in plan.tiles_bool().nonzero().tolist():
        for kv in {h * kv_heads // heads for h in range(head * width, (head + 1) * width)}:
            rank = int(layout.source_of_block[plan.geometry.blocks[query]])
            if rank != int(layout.source_of_block[key]):
                needed.add((rank, b, kv, key))
    return len(needed)
