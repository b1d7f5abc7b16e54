"""Work: what a batch is expected to cost, and how a layout spreads it over ranks and ring steps.

The unit is one tile. Where a function takes `tiles`, `tiles[i]` is the work of query block i with the key
blocks 0, 1, ..., as many as the row has entries (the rest is 0). A [num_blocks, num_blocks] array is
that, and so is `ExpectedTiles`, which makes its rows when asked: at a million tokens the array would take
a quarter of a gigabyte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .layout import Layout
from .statistics import Statistics, columns_at_depth, missed_shares

Documents = Sequence[Sequence[tuple[int, int]]]  # for each batch row the token ranges [start, end)
ROWS = 2048  # query blocks that one estimate looks at; of longer sequences evenly spaced ones


@dataclass(frozen=True, eq=False)
class ExpectedTiles:
    """Expected work of every tile of a batch, summed over its rows: `tiles[query block]`.

    first: int [B, num_blocks], see `first_blocks`. missed_by_distance, missed_by_offset: float32
    [num_blocks]; their product is the share of heads that do not choose a tile.
    """

    first: np.ndarray
    missed_by_distance: np.ndarray
    missed_by_offset: np.ndarray

    def __getitem__(self, block: int) -> np.ndarray:
        """float32 [block + 1]: work with the key blocks up to the diagonal; later ones are invisible."""
        row = np.zeros(block + 1, dtype=np.float32)
        for first in self.first[:, block].tolist():
            visible = max(block + 1 - first, 0)
            missed = self.missed_by_distance[:visible][::-1] * self.missed_by_offset[:visible]
            row[first:] += 1 - np.minimum(missed, 1)
        return row


def first_blocks(documents: Documents, num_blocks: int, block_size: int) -> np.ndarray:
    """int64 [B, num_blocks]: the first key block that any query of a block sees, causally.

    That is the block where the earliest document of the query block starts; a query block holds every
    tile from there to its diagonal. A block without a token of any document gets its own id + 1.
    """
    first = np.tile(np.arange(1, num_blocks + 1), (len(documents), 1))
    for row, ranges in zip(first, documents, strict=True):
        for start, end in ranges:
            held = row[start // block_size : -(-end // block_size)]
            np.minimum(held, start // block_size, out=held)
    return first


def expected_tiles(
    documents: Documents, num_blocks: int, block_size: int, statistics: Statistics | None = None
) -> ExpectedTiles:
    """Expected tile work of a batch from its documents and from what earlier plans chose.

    Without statistics (or with empty ones) every visible tile counts as 1. Statistics may come from
    another number of blocks.
    """
    first = first_blocks(documents, num_blocks, block_size)
    if statistics is None or not statistics.rows_by_depth.any():
        missed = (np.zeros(num_blocks), np.zeros(num_blocks))
    else:
        missed = missed_shares(statistics, num_blocks)
    return ExpectedTiles(first, *(share.astype(np.float32) for share in missed))


def expected_columns(
    documents: Documents, num_blocks: int, block_size: int, statistics: Statistics | None = None
) -> np.ndarray:
    """float64 [num_blocks]: expected column work of each query block in tiles, summed over batch rows."""
    if statistics is None or not statistics.rows_by_depth.any():
        return np.zeros(num_blocks)
    depth = np.arange(num_blocks) - first_blocks(documents, num_blocks, block_size)
    return np.where(depth >= 0, columns_at_depth(statistics, depth), 0.0).sum(0)


def block_work(tiles: Sequence[np.ndarray], columns: np.ndarray) -> np.ndarray:
    """float64 [num_blocks]: total work of each query block, interpolated between those looked at."""
    blocks = np.arange(len(columns))
    seen = blocks[:: _stride(len(columns))]
    return np.interp(blocks, seen, [tiles[i].sum(dtype=np.float64) for i in seen.tolist()]) + columns


def work_matrix(layout: Layout, tiles: Sequence[np.ndarray], columns: np.ndarray) -> np.ndarray:
    """Work of every rank in every step of a ring, float64 [W, W + 1] in tiles.

    Step t < W computes with the keys of rank - t; the last entry is the column work ([num_blocks], by
    query block), which needs no travelling keys and is done after the ring. Exact up to 2048 blocks.
    """
    stride = _stride(layout.num_blocks)
    by_key = np.zeros((layout.world, layout.num_blocks), dtype=np.float32)
    for total, blocks in zip(by_key, layout.assignment, strict=True):
        for block in blocks[::stride]:
            row = tiles[block]
            total[: len(row)] += row
        total *= len(blocks) / max(len(blocks[::stride]), 1)
    ranks = np.arange(layout.world)
    held = [list(blocks) for blocks in layout.assignment]
    by_source = np.stack([by_key[:, blocks].sum(1, dtype=np.float64) for blocks in held], axis=1)
    steps = by_source[ranks[:, None], (ranks[:, None] - ranks) % layout.world]
    return np.column_stack([steps, [columns[blocks].sum() for blocks in held]])


def worker_imbalance(work: np.ndarray) -> float:
    """Max over ranks / mean over ranks of total work. work: [ranks, steps]; 1.0 if there is none."""
    totals = work.sum(1)
    return float(totals.max() / totals.mean()) if totals.any() else 1.0


def step_imbalance(work: np.ndarray) -> float:
    """Sum over steps of the slowest rank / sum over steps of the mean. work: [ranks, steps]."""
    return float(work.max(0).sum() / work.mean(0).sum()) if work.any() else 1.0


def _stride(num_blocks: int) -> int:
    return -(-num_blocks // ROWS)
