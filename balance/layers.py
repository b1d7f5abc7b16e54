"""Layer groups: layers whose plans are summed up and planned for together.

All layers of a step share a layout and an exchange, but each waits for its own slowest rank. So the time of a
step is a sum over layers of largest shares, which the sum of their work hides where layers are unequal in
different ways. A few groups of consecutive layers, each with statistics of its own, keep them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .layout import Layout
from .statistics import Statistics
from .tiles import CELLS, Documents, Tiles, expected_columns, expected_tiles


@dataclass(frozen=True, eq=False)
class Layers:
    """What the mean layer of a group does in a batch. columns: float64 [num_blocks], column work of each
    query block in tiles. share: of all layers."""

    tiles: Tiles
    columns: np.ndarray
    share: float = 1.0

    @cached_property
    def by_block(self) -> np.ndarray:
        """float64 [num_blocks]: work of each query block."""
        return self.tiles.sums() + self.columns


def expected_layers(
    documents: Documents,
    num_blocks: int,
    block_size: int,
    statistics: Statistics | None = None,
    heads: float = 1,
) -> list[Layers]:
    """The groups that the statistics are of; one, in which every visible tile counts, without any.

    heads: see `ExpectedTiles`. Groups share the number of tiles that their work is estimated from.
    """
    groups = [Statistics.zeros(num_blocks)] if statistics is None else statistics.by_group()
    rows = np.array([group.rows_by_depth.sum() for group in groups])
    shares = rows / rows.sum() if rows.any() else np.full(len(groups), 1 / len(groups))
    sizes, cells = (documents, num_blocks, block_size), CELLS // len(groups)
    return [
        Layers(expected_tiles(*sizes, group, heads, cells), expected_columns(*sizes, group), float(share))
        for group, share in zip(groups, shares, strict=True)
    ]


def mean(layers: Sequence[Layers], values: Sequence[np.ndarray]) -> np.ndarray:
    """Of the mean layer. values: of each group."""
    return sum(group.share * value for group, value in zip(layers, values, strict=True))


def work_of(layers: Sequence[Layers], layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """([groups, W, W], [groups, W]): work of each rank with the keys of each, and column work, in tiles."""
    owner, world = layout.source_of_block, layout.world
    columns = [np.bincount(owner, group.columns, world) for group in layers]
    return np.stack([group.tiles.by_source(layout) for group in layers]), np.stack(columns)
