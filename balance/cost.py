"""Work: what a batch is expected to cost, and how a layout spreads it over ranks and ring steps.

The unit is one tile. Where a function takes `tiles`, it takes the work of each (query block, key block)
pair as an array [num_blocks, num_blocks], or `ExpectedTiles`, which makes the rows one by one: at a
million tokens the array would take a quarter of a gigabyte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .layout import Layout
from .schedule import order as order_of
from .statistics import Statistics, columns_at_depth, missed_shares, tiles_at_depth

Documents = Sequence[Sequence[tuple[int, int]]]  # for each batch row the token ranges [start, end)


@dataclass(frozen=True, eq=False)
class ExpectedTiles:
    """Expected work of every tile of a batch, summed over its rows.

    first: int [B, num_blocks], see `first_blocks`. missed_by_distance, missed_by_offset: [num_blocks],
    float32; their product, at most 1, is the share of heads expected not to choose a visible tile.
    """

    first: np.ndarray
    missed_by_distance: np.ndarray
    missed_by_offset: np.ndarray

    def rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """For each query block the first key block that it sees and the work from there to the diagonal."""
        backwards = self.missed_by_distance[::-1].copy()  # along a row the distance falls
        end = len(backwards)

        def work(length: int) -> np.ndarray:
            missed = backwards[end - length :] * self.missed_by_offset[:length]
            return np.subtract(1, np.minimum(missed, 1, out=missed), out=missed)

        for block, firsts in enumerate(np.sort(self.first, axis=0).T.tolist()):
            row, *others = (work(block + 1 - first) for first in firsts)
            for other in others:
                row[len(row) - len(other) :] += other
            yield firsts[0], row

    def sums(self) -> np.ndarray:
        """float64 [num_blocks]: total tile work of each query block."""
        depth = np.arange(self.first.shape[1]) - self.first
        shares = (self.missed_by_distance, self.missed_by_offset)
        at_depth = tiles_at_depth(*(share.astype(np.float64) for share in shares))
        return np.where(depth >= 0, at_depth[depth], 0).sum(0)

    def dense(self) -> np.ndarray:
        """float32 [num_blocks, num_blocks]."""
        result = np.zeros((self.first.shape[1],) * 2, dtype=np.float32)
        for block, (first, row) in enumerate(self.rows()):
            result[block, first : block + 1] = row
        return result


Tiles = np.ndarray | ExpectedTiles


def first_blocks(documents: Documents, num_blocks: int, block_size: int) -> np.ndarray:
    """int64 [B, num_blocks]: the first key block that any query of a block sees, causally.

    That is the block where the earliest document of the query block starts; a query block holds every
    tile from there to its diagonal. A block without a token of any document gets its own id + 1.
    """
    first = np.tile(np.arange(1, num_blocks + 1), (len(documents), 1))
    for row, ranges in zip(first, documents, strict=True):
        for start, end in ranges:
            if not 0 <= start < end <= num_blocks * block_size:
                raise ValueError(
                    f"document ({start}, {end}) is empty or not inside the {num_blocks * block_size} "
                    f"tokens of the sequence; give non-empty ranges of padded positions"
                )
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


def block_work(tiles: Tiles, columns: np.ndarray) -> np.ndarray:
    """float64 [num_blocks]: total work of each query block. columns: see `work_matrices`."""
    if isinstance(tiles, ExpectedTiles):
        return tiles.sums() + columns
    return tiles.sum(1, dtype=np.float64) + columns


def work_matrices(
    layouts: Sequence[Layout], tiles: Tiles, columns: np.ndarray, order: np.ndarray | None = None
) -> list[np.ndarray]:
    """For each layout the work of every rank in every step, float64 [W, W + 1] in tiles.

    order: int [W, W], whose keys each rank computes with in each step; None for a flat ring, where they are
    those of rank - step. The last entry is the column work ([num_blocks], by query block), which needs no
    travelling keys and is done after them.
    """
    if order is None:
        order = order_of("ring", layouts[0].world)
    by_key = [np.zeros((layout.world, len(columns)), dtype=np.float32) for layout in layouts]
    owners = zip(*(layout.source_of_block.tolist() for layout in layouts), strict=True)
    rows = tiles.rows() if isinstance(tiles, ExpectedTiles) else ((0, row) for row in tiles)
    for (first, row), ranks in zip(rows, owners, strict=True):
        for total, rank in zip(by_key, ranks, strict=True):
            total[rank, first : first + len(row)] += row
    return [_by_step(*each, columns, order) for each in zip(layouts, by_key, strict=True)]


def worker_imbalance(work: np.ndarray) -> float:
    """Max over ranks / mean over ranks of total work. work: [ranks, steps]; 1.0 if there is none."""
    totals = work.sum(1)
    return float(totals.max() / totals.mean()) if totals.any() else 1.0


def step_imbalance(work: np.ndarray) -> float:
    """Sum over steps of the slowest rank / sum over steps of the mean. work: [ranks, steps]."""
    return float(work.max(0).sum() / work.mean(0).sum()) if work.any() else 1.0


def _by_step(layout: Layout, by_key: np.ndarray, columns: np.ndarray, order: np.ndarray) -> np.ndarray:
    """[W, W + 1] from the work of each rank with each key block, by_key [W, num_blocks]."""
    held = [list(blocks) for blocks in layout.assignment]
    by_source = np.stack([by_key[:, blocks].sum(1, dtype=np.float64) for blocks in held], axis=1)
    steps = np.take_along_axis(by_source, order, axis=1)
    return np.column_stack([steps, [columns[blocks].sum() for blocks in held]])
