"""Work: how a layout spreads what a batch costs over ranks and steps. The unit is one tile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .layout import Layout
from .schedule import step_of_source
from .tiles import Tiles, as_tiles


def work_matrices(
    layouts: Sequence[Layout], tiles: Tiles | np.ndarray, columns: np.ndarray, steps: np.ndarray | None = None
) -> list[np.ndarray]:
    """For each layout the work of every rank in every step, float64 [W, steps + 1] in tiles.

    tiles: an array [num_blocks, num_blocks], the work of each query block with each key block, or
    `ExpectedTiles`. steps: int [W, W], in which step each rank computes with the keys of each source, as
    `step_of_source` gives it; None for a flat ring, where that is rank - source. The last entry is the column
    work ([num_blocks], by query block), which needs no travelling keys and is done after them.
    """
    if steps is None:
        steps = step_of_source("ring", layouts[0].world)
    tiles = as_tiles(tiles)
    return [work_by_step(tiles.by_source(layout), work_by_rank(layout, columns), steps) for layout in layouts]


def work_by_step(by_source: np.ndarray, columns: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """[..., W, steps + 1] from work of ranks with the keys of each, [..., W, W], and of columns, [..., W]."""
    world, count = by_source.shape[-1], int(steps.max()) + 1
    cells = (np.arange(world)[:, None] * count + steps).ravel()
    rows = by_source.reshape(-1, world * world)
    by_step = np.stack([np.bincount(cells, row, world * count) for row in rows])
    return np.concatenate([by_step.reshape(*by_source.shape[:-1], count), columns[..., None]], axis=-1)


def work_by_rank(layout: Layout, by_block: np.ndarray) -> np.ndarray:
    """float64 [W]: sums of what each query block costs ([num_blocks]) over the blocks of each rank."""
    return np.bincount(layout.source_of_block, by_block, layout.world)


def worker_imbalance(work: np.ndarray) -> float:
    """Max over ranks / mean over ranks of total work. work: [ranks, steps]; 1.0 if there is none."""
    totals = work.sum(1)
    return float(totals.max() / totals.mean()) if totals.any() else 1.0


def step_imbalance(work: np.ndarray) -> float:
    """Sum over steps of the slowest rank / sum over steps of the mean. work: [ranks, steps]."""
    return float(work.max(0).sum() / work.mean(0).sum()) if work.any() else 1.0
