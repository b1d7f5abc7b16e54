"""Local search: equal work for all ranks by few exchanges of chunks, those that need the fewest keys more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .layout import Layout
from .tiles import Tiles, sampled_keys

CHUNKS = 128  # into how many chunks the blocks of all ranks are cut, at least 4 a rank
KEYS = 64  # key blocks at which needs are compared
EXCHANGES = 64  # at most, or two for each rank
FREE = 0.01  # key blocks that count as nothing: among exchanges for less, the larger one is the better


def rebalance(
    layout: Layout,
    by_block: np.ndarray,
    tiles: Sequence[Tiles],
    tolerance: float,
    inner: int | None = None,
    near: float = 1.0,
) -> Layout:
    """`layout` after exchanges of equally long chunks between its heaviest rank and lighter ones.

    Every exchange makes the heaviest rank lighter and the other one not as heavy; of all such it is the one
    with the fewest additionally needed key blocks for the work that it takes away. They end when no rank has
    more than 1 + tolerance of the mean, or after enough of them. Ranks keep their numbers of blocks, and hold
    them in logical order. by_block: [num_blocks], the work of each query block; tiles: of each layer group.
    inner: ranks of a node; near: what a key of the own node costs, as a share of one of another.
    """
    if not min(layout.blocks_per_rank):
        return layout
    search = _Search(layout, by_block, tiles, inner or layout.world, near)
    for _ in range(max(EXCHANGES, 2 * layout.world)):
        if not search.exchange(tolerance):
            break
    return replace(layout, assignment=search.assignment(), name=f"balanced {layout.name}")


class _Search:
    """Chunks [c], their owners and their work, the work of ranks, and what exchanges would cost.

    added: [c, W], key blocks that a rank would need more with a chunk; freed: [c], fewer its owner without
    it.
    """

    def __init__(self, layout: Layout, by_block: np.ndarray, tiles: Sequence[Tiles], inner: int, near: float):
        parts = min(min(layout.blocks_per_rank), max(4, CHUNKS // layout.world))
        self.chunks = [part for held in layout.assignment for part in np.array_split(np.array(held), parts)]
        self.world, self.owner = layout.world, np.repeat(np.arange(layout.world), parts)
        self.held = np.arange(len(self.chunks)).reshape(layout.world, parts)
        self.size = np.array([len(chunk) for chunk in self.chunks])
        bounds, blocks = np.concatenate([[0], np.cumsum(self.size)]), np.concatenate(self.chunks)
        self.work = np.add.reduceat(by_block[blocks], bounds[:-1]).round(6)
        self.load = np.bincount(self.owner, self.work, self.world)
        self.mean = float(self.load.mean())
        rows = sum(each.batch for each in tiles)
        keys = sampled_keys(layout.num_blocks, max(8, KEYS // rows))
        logs = np.concatenate([each.log_missed(blocks, bounds, keys) for each in tiles])
        self.logs = np.swapaxes(logs, 0, 1).reshape(len(self.chunks), -1).astype(np.float32)
        self.needs = 1 - np.exp(self.logs)
        node = np.arange(self.world) // inner
        there = np.tile(node[layout.source_of_block[keys]], rows)  # before any exchange
        self.price = np.where(node[:, None] == there, near, 1).astype(np.float32)
        self.added = np.zeros((len(self.chunks), self.world), dtype=np.float32)
        self.freed = np.zeros(len(self.chunks), dtype=np.float32)
        for rank in range(0, self.world, 2):
            self.count(np.arange(rank, min(rank + 2, self.world)))

    def assignment(self) -> tuple[tuple[int, ...], ...]:
        order = np.argsort(self.owner, kind="stable")
        held: list[list[int]] = [[] for _ in range(self.world)]
        for chunk in order.tolist():
            held[self.owner[chunk]] += self.chunks[chunk].tolist()
        return tuple(tuple(sorted(blocks)) for blocks in held)

    def exchange(self, tolerance: float) -> bool:
        """Does the best exchange of the heaviest rank; False if it is light enough or has none."""
        mean, heavy = self.mean, int(self.load.argmax())
        load, least = self.load[heavy], 1e-6 * mean
        if load <= mean * (1 + tolerance):
            return False
        own, others = self.held[heavy], np.flatnonzero((self.load < mean)[self.owner])
        light = self.owner[others]
        moved = self.work[own, None] - self.work[others]
        after = np.maximum(np.maximum(load - moved, self.load[light] + moved), mean)
        gain = (load - after) * (self.size[own, None] == self.size[others])
        cost = self.added[own][:, light] - self.freed[own, None]
        cost += self.added[others, heavy] - self.freed[others]
        score = np.where(gain > least, np.maximum(cost, FREE) / np.maximum(gain, least), np.inf)
        row, column = divmod(int(score.argmin()), len(others))
        if not gain[row, column] > least:
            return False
        rank = light[column]
        place = np.flatnonzero(self.held[rank] == others[column])
        self.owner[[own[row], others[column]]] = rank, heavy
        self.held[rank, place], self.held[heavy, row] = own[row], others[column]
        self.load[[heavy, rank]] += np.array([-1, 1]) * moved[row, column]
        self.count(np.array([heavy, rank]))
        return True

    def count(self, ranks: np.ndarray) -> None:
        """What exchanges would cost some ranks."""
        held = self.held[ranks]
        logs, price = self.logs[held], self.price[ranks]
        total = logs.sum(1)
        missed = np.exp(total) * price
        without = np.exp(total[:, None] - logs) * price[:, None]
        self.freed[held] = (without - missed[:, None]).sum(2).round(3)
        self.added[:, ranks] = np.einsum("ck,rk->cr", self.needs, missed).round(3)
