"""The second lever: query blocks that other ranks compute, for one layer whose measured work is unequal.

A layout is chosen for all layers of a step before their plans are known. Where the plan of a layer turns out
unequal, query blocks move for that layer alone, with their outputs and gradients; keys stay where they are.
Every rank decides alone and all decide alike.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from .layout import Layout
from .topology import Constants

UNEQUAL, EQUAL = 1.05, 1.02  # worker imbalance from which blocks move, and at which no more do
GAIN = 0.03  # share of the slowest rank's seconds that a move must save
MESSAGES = 6  # queries, outputs, their lse, and the gradients of the three


@dataclass(frozen=True)
class MoveCost:
    """Seconds, forward and backward: tile for one tile of all heads; block for each query block that a rank
    sends away or gets, whichever are more; fixed for moving any."""

    tile: float
    block: float
    fixed: float


def move_cost(
    machine: Constants,
    nodes: int,
    held: int,
    block_size: int,
    batch: int,
    heads: int,
    dim: int,
    itemsize: int,
) -> MoveCost:
    """Of one layer. held: query blocks of a rank. batch, heads, dim, itemsize: of queries, the last in bytes.

    Over nodes every block is taken to cross: their link is the slower one.
    """
    link = machine.between if nodes > 1 else machine.inside
    scale = (block_size / machine.block_size) ** 2 * dim / machine.dim
    size = batch * heads * block_size * (4 * dim * itemsize + 2 * 4)  # q, out, dout, dq; lse, dlse in fp32
    return MoveCost(
        tile=scale * heads * (machine.forward.tile + machine.backward.tile),
        block=size / link.bandwidth,
        fixed=MESSAGES * link.latency + 2 * held * size / machine.memory,  # those that stay are copied too
    )


def may_pay(load: np.ndarray, cost: MoveCost) -> bool:
    """Whether moving could be worth it for ranks with work [W], in tiles: if blocks were free to move."""
    slowest, mean = cost.tile * load.max(), cost.tile * load.mean()
    return slowest > UNEQUAL * mean and mean + cost.fixed < (1 - GAIN) * slowest


def move_blocks(work: np.ndarray, layout: Layout, cost: MoveCost) -> np.ndarray | None:
    """int64 [num_blocks]: the rank that computes each query block; None to leave them with the layout.

    work: float64 [num_blocks], tiles of each query block, columns included, mean over heads. The heaviest
    rank gives the lightest the block that fits best what one has too much and the other too little, until all
    are equal or nothing helps. Of these moves the first so many are made that save most, if any save enough.
    """
    rank = layout.source_of_block.astype(np.int64)
    load = np.bincount(rank, work, layout.world)
    if not may_pay(load, cost):
        return None
    mean, waiting = load.mean(), _by_work(work, rank, layout.world)
    sent, got = np.zeros((2, layout.world), dtype=np.int64)
    moves: list[tuple[int, int]] = []
    best, least = 0, (1 - GAIN) * cost.tile * load.max()
    while load.max() > EQUAL * mean:
        heavy, light = int(load.argmax()), int(load.argmin())
        gap = load[heavy] - load[light]
        block = _take_nearest(waiting[heavy], min(load[heavy] - mean, mean - load[light]), gap)
        if block is None:
            break
        moves.append((block, light))
        load[heavy] -= work[block]
        load[light] += work[block]
        sent[heavy] += 1
        got[light] += 1
        seconds = cost.tile * load.max() + cost.fixed + cost.block * max(sent.max(), got.max())
        if seconds < least:
            best, least = len(moves), seconds
    for block, to in moves[:best]:
        rank[block] = to
    return rank if best else None


def _by_work(work: np.ndarray, rank: np.ndarray, world: int) -> list[tuple[list[float], list[int]]]:
    """For each rank its blocks that have work: that of each, ascending, and their ids."""
    order = np.argsort(work, kind="stable")
    order = order[work[order] > 0]
    held = [order[rank[order] == each] for each in range(world)]
    return [(work[blocks].tolist(), blocks.tolist()) for blocks in held]


def _take_nearest(waiting: tuple[list[float], list[int]], wanted: float, gap: float) -> int | None:
    """Removes the block with the work nearest to what is wanted, if that is below the gap of two ranks."""
    works, blocks = waiting
    place = bisect_left(works, wanted)
    if place == len(works) or (place and wanted - works[place - 1] <= works[place] - wanted):
        place -= 1
    if place < 0 or works[place] >= gap:
        return None
    works.pop(place)
    return blocks.pop(place)
