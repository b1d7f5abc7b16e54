"""The layouts that the planner weighs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .layout import Layout, named
from .search import rebalance
from .tiles import Tiles
from .topology import Topology

NAMED = ("contiguous", "zigzag", "striped", "striped(4)")
EQUAL = 1.015  # the most that a rank may have of the mean after a local search
LOOSE = 1.025  # the same where keys are dear
UNIT = 16  # pieces of a rank's blocks that `folded` keeps together
LEVELS = 64  # of work that it tells apart


@lru_cache(maxsize=64)
def fixed(name: str, num_blocks: int, world: int, block_size: int) -> Layout:
    """A layout that does not look at work; kept, most steps weigh the same ones."""
    return named(name, num_blocks, world, block_size)


def layouts(by_block: np.ndarray, world: int, block_size: int) -> list[Layout]:
    """Those for exchanges that move all keys, simple ones first. by_block: [num_blocks], see `rebalance`."""
    known = [fixed(name, len(by_block), world, block_size) for name in NAMED]
    return [*known, work_sorted(by_block, world, block_size)]


def local_layouts(
    by_block: np.ndarray, tiles: Sequence[Tiles], block_size: int, topology: Topology
) -> list[Layout]:
    """Those that let ranks need few keys of others, for exchanges that then move less; work is equal.

    tiles: of each layer group.
    """
    world = topology.world
    known = [folded(by_block, world, block_size), folded(by_block, world, block_size, LOOSE)]
    if runs(known[0]) > 3 * world:  # work does not just grow along the sequence: less local than could be
        start = fixed("contiguous", len(by_block), world, block_size)
        near = topology.between.bandwidth / topology.inside.bandwidth
        known.append(rebalance(start, by_block, tiles, EQUAL - 1, topology.inner, near))
    return known


def runs(layout: Layout) -> int:
    """Of consecutive blocks, on all ranks."""
    return 1 + int(np.count_nonzero(np.diff(layout.source_of_block)))


def work_sorted(by_block: np.ndarray, world: int, block_size: int) -> Layout:
    """Query blocks sorted by work and dealt in snake order; equal work goes to the lower id first.

    by_block: [num_blocks], work in tiles; differences below 1e-6 do not count. A rank keeps its blocks
    in logical order.
    """
    order = np.argsort(-np.round(by_block, 6), kind="stable")
    turn, place = np.divmod(np.arange(len(order)), world)
    rank = np.where(turn % 2 == 0, place, world - 1 - place)
    assignment = [np.sort(order[rank == r]).tolist() for r in range(world)]
    return _layout(assignment, block_size, "work-sorted")


def folded(by_block: np.ndarray, world: int, block_size: int, limit: float = 1.0) -> Layout:
    """Two runs of blocks for each rank, one light and one heavy, whose lengths make its work the mean.

    Blocks stand in the order of their work, in pieces of a few consecutive ones. Rank 0 takes from both ends,
    rank 1 goes on where it stopped: a zigzag whose runs are not equally long, and that for dense causal work.
    Where work grows along the sequence no balanced layout lets ranks see fewer keys: the rank with the latest
    blocks has as few early ones as it can. limit: a rank may have this times the mean, so that it takes fewer
    early blocks still.
    """
    num_blocks = len(by_block)
    order = _by_work(by_block, max(1, num_blocks // (world * UNIT)))
    sums = np.concatenate([[0.0], np.cumsum(by_block[order])])
    low, high, assignment = 0, num_blocks, []
    for rank in range(world):
        count = (high - low) // (world - rank)
        light = np.arange(count + 1)  # as many of the light blocks, the rest heavy ones
        work = sums[low + light] - sums[low] + sums[high] - sums[high - count + light]
        target = max(limit * sums[-1] / world, (sums[high] - sums[low]) / (world - rank))
        fits = np.flatnonzero(work <= target + 1e-6)
        taken = int(fits[0]) if len(fits) else count
        if taken and limit == 1 and target - work[taken] > work[taken - 1] - target:
            taken -= 1
        held = np.concatenate([order[low : low + taken], order[high - count + taken : high]])
        assignment.append(np.sort(held).tolist())
        low, high = low + taken, high - count + taken
    name = "folded" if limit == 1 else f"folded({limit:g})"
    return _layout(assignment, block_size, name)


def _by_work(by_block: np.ndarray, unit: int) -> np.ndarray:
    """All blocks, pieces of `unit` of them in the order of their work; about equal ones by id."""
    starts = np.arange(0, len(by_block), unit)
    means = np.add.reduceat(by_block, starts) / np.diff([*starts, len(by_block)])
    level = np.floor(means / max(means.max(), 1e-12) * LEVELS + 0.5)
    blocks = np.arange(len(by_block))
    return blocks[np.argsort(level[blocks // unit], kind="stable")]


def _layout(assignment: list[list[int]], block_size: int, name: str) -> Layout:
    return Layout(block_size, sum(map(len, assignment)), tuple(map(tuple, assignment)), name)
