"""The tiles of a batch before its forward: how much work each is expected to be, and how likely it is needed.

`ExpectedTiles` knows them from documents and statistics, `GivenTiles` from an array. The unit of work is one
tile. A rank needs a key block if any of its query blocks chooses it in any query head of the key head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .layout import Layout
from .statistics import Statistics, columns_at_depth, missed_shares, tiles_at_depth, work_scale

Documents = Sequence[Sequence[tuple[int, int]]]  # for each batch row the token ranges [start, end)

CELLS = 1 << 20  # tiles that the work of ranks with sources is estimated from
FEW, ROWS = 1 << 17, 1 << 15  # tiles of ranks, and of query blocks, that are looked at together, for speed
KEYS, LEAST = 4, 256  # key blocks of each rank, and of all at least, that needs are estimated from
SMALLEST = 1e-6  # a share of missed tiles that counts as none
ALIKE = 0.02  # scales of work that differ less from 1 do not change how it is spread over keys
LARGEST = np.float32(np.inf)


class Tiles(ABC):
    """Work and needs of all tiles, summed over the rows of a batch."""

    num_blocks: int
    batch: int
    cells = 0  # tiles that `by_source` may look at where there are more; 0: at all

    @abstractmethod
    def sums(self) -> np.ndarray:
        """float64 [num_blocks]: total work of each query block."""

    @abstractmethod
    def work(self, blocks: np.ndarray) -> np.ndarray:
        """float32 [k, num_blocks]: the work of some query blocks with each key block."""

    def summed(self, blocks: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        """float32 [groups, num_blocks]: the work of groups of query blocks, see `log_missed`."""
        return np.add.reduceat(self.work(blocks), bounds[:-1])

    @abstractmethod
    def log_missed(self, blocks: np.ndarray, bounds: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """float64 [batch, groups, keys]: log of the share of key heads that a group does not need a block of.

        blocks: int [n], query blocks; group g is blocks[bounds[g] : bounds[g + 1]]. keys: int [k], block ids.
        """

    def by_source(self, layout: Layout) -> np.ndarray:
        """float64 [W, W]: the work of each rank with the keys of each rank.

        Where it may not look at all tiles a rank's profile is that of an even sample of its query blocks; its
        total is that of all.
        """
        order, world = layout.order, layout.world
        stride = max(1, self.num_blocks**2 * self.batch // self.cells) if self.cells else 1
        filled = np.flatnonzero(layout.blocks_per_rank)
        starts, ends = layout.bounds[filled], layout.bounds[filled + 1]
        result = np.zeros((world, world))
        parts = range(0, len(filled), max(1, FEW // self.num_blocks))
        for few in map(slice, parts, (*parts[1:], None)):
            samples = [
                order[start + min(stride, end - start) // 2 : end : stride]
                for start, end in zip(starts[few], ends[few], strict=True)
            ]
            bounds = np.concatenate([[0], np.cumsum([len(sample) for sample in samples])])
            by_key = self.summed(np.concatenate(samples), bounds).take(order, axis=1)
            sources = np.add.reduceat(by_key, starts, axis=1, dtype=np.float64)
            result[np.ix_(filled[few], filled)] = sources
        totals = np.add.reduceat(self.sums()[order], starts)
        seen = result.sum(1)[filled]
        result[filled] *= np.divide(totals, seen, out=np.zeros(len(filled)), where=seen > 0)[:, None]
        return result

    def needed(self, layout: Layout) -> np.ndarray:
        """float64 [W, W]: key blocks of each rank (column) that each rank (row) needs, mean over key heads.

        The diagonal holds a rank's own. Where there are many, key blocks are sampled evenly; of a rank none
        of whose blocks is among them, the others are taken to need as much as of all.
        """
        world = layout.world
        keys = sampled_keys(self.num_blocks, max(LEAST, KEYS * world))
        missed = np.exp(self.log_missed(layout.order, layout.bounds, keys)).round(6)
        needed, owner = len(missed) - missed.sum(0), layout.source_of_block[keys]
        cells = (np.arange(world)[:, None] * world + owner).ravel()
        sums = np.bincount(cells, needed.ravel(), world * world).reshape(world, world)
        seen = np.bincount(owner, minlength=world)
        everywhere = needed.sum(1, keepdims=True) / max(1, len(keys))
        shares = np.divide(sums, seen, out=np.tile(everywhere, (1, world)), where=seen > 0)
        return shares * np.array(layout.blocks_per_rank)


@dataclass(frozen=True, eq=False)
class GivenTiles(Tiles):
    """array: [num_blocks, num_blocks], the work of each tile, the share of heads that choose it.

    heads: query heads of a key head, taken to choose independently.
    """

    array: np.ndarray
    heads: float = 1

    batch = 1

    @property
    def num_blocks(self) -> int:
        return len(self.array)

    def sums(self) -> np.ndarray:
        return self.array.sum(1, dtype=np.float64)

    def work(self, blocks: np.ndarray) -> np.ndarray:
        return self.array[blocks]

    def log_missed(self, blocks: np.ndarray, bounds: np.ndarray, keys: np.ndarray) -> np.ndarray:
        missed = np.clip(1.0 - self.array[np.ix_(blocks, keys)], SMALLEST, 1)
        return _group_sums(self.heads * np.log(missed), bounds)[None]


@dataclass(frozen=True, eq=False)
class ExpectedTiles(Tiles):
    """Expected work of every tile of a batch.

    first: int [B, num_blocks], see `first_blocks`. missed_by_distance, missed_by_offset: [num_blocks],
    float32; their product, at most 1, is the share of heads expected not to choose a visible tile. scale:
    float64 [num_blocks], by depth, what that makes of the work of a query block is to be multiplied with.
    heads: query heads of a key head, taken to choose independently. cells: see `Tiles`.
    """

    first: np.ndarray
    missed_by_distance: np.ndarray
    missed_by_offset: np.ndarray
    scale: np.ndarray
    heads: float = 1
    cells: int = CELLS

    @property
    def num_blocks(self) -> int:
        return self.first.shape[1]

    @property
    def batch(self) -> int:
        return len(self.first)

    @cached_property
    def _sums(self) -> np.ndarray:
        depth = np.arange(self.num_blocks) - self.first
        shares = (self.missed_by_distance, self.missed_by_offset)
        at_depth = tiles_at_depth(*(share.astype(np.float64) for share in shares)) * self.scale
        return np.where(depth >= 0, at_depth[depth], 0).sum(0)

    def sums(self) -> np.ndarray:
        return self._sums

    @cached_property
    def _windows(self) -> tuple[np.ndarray, np.ndarray]:
        """Views of missed_by_distance backwards and of missed_by_offset, infinite where nothing is visible.

        Row n - 1 - i of the first is query block i, row n - f of the second first block f.
        """
        n = self.num_blocks
        distance, offset = (
            np.maximum(share, np.float32(SMALLEST))
            for share in (self.missed_by_distance, self.missed_by_offset)
        )
        unseen = np.full(n, LARGEST)
        padded = np.concatenate([distance[::-1], unseen[1:]]), np.concatenate([unseen, offset])
        return tuple(np.lib.stride_tricks.sliding_window_view(each, n) for each in padded)

    def work(self, blocks: np.ndarray) -> np.ndarray:
        return self.summed(blocks, np.arange(len(blocks) + 1))

    def summed(self, blocks: np.ndarray, bounds: np.ndarray) -> np.ndarray:
        group = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        total = np.zeros((len(bounds) - 1, self.num_blocks), dtype=np.float32)
        order, few = np.argsort(blocks, kind="stable"), max(1, ROWS // self.num_blocks)
        for some in np.split(order, range(few, len(order), few)):  # which see about the same keys
            for first in self.first[:, blocks[some]]:
                low, high = int(first.min()), int(blocks[some[-1]]) + 1
                if low < high:
                    rows = self._rows(blocks[some], first, slice(low, high))
                    for number, row in zip(group[some].tolist(), rows, strict=True):
                        total[number, low:high] += row
        return total

    def _rows(self, blocks: np.ndarray, first: np.ndarray, keys: slice) -> np.ndarray:
        """float32 [k, keys]: work of query blocks of one batch row."""
        by_distance, by_offset = self._windows
        missed = by_distance[self.num_blocks - 1 - blocks, keys]
        missed *= by_offset[self.num_blocks - np.minimum(first, self.num_blocks), keys]
        np.subtract(1, np.minimum(missed, 1, out=missed), out=missed)
        if self._scaled:
            missed *= self.scale[np.maximum(blocks - first, 0), None].astype(np.float32)
            np.minimum(missed, 1, out=missed)
        return missed

    @cached_property
    def _scaled(self) -> bool:
        return bool(np.abs(self.scale - 1).max() > ALIKE)

    def log_missed(self, blocks: np.ndarray, bounds: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Along a run of query blocks the product of shares is a difference of prefix sums of logarithms."""
        return np.stack([self._log_missed(first, blocks, bounds, keys) for first in self.first])

    @cached_property
    def _logs(self) -> tuple[np.ndarray, np.ndarray]:
        """float64: [num_blocks + 1] sums over all smaller distances, [num_blocks] by offset."""
        distance, offset = (
            self.heads * np.log(np.maximum(share.astype(np.float64), SMALLEST))
            for share in (self.missed_by_distance, self.missed_by_offset)
        )
        return np.concatenate([[0.0], np.cumsum(distance)]), offset

    def _log_missed(self, first, blocks, bounds, keys) -> np.ndarray:
        by_distance, by_offset = self._logs
        firsts = first[blocks]
        cut = (np.diff(blocks) != 1) | (np.diff(firsts) != 0)
        cut[bounds[(bounds > 0) & (bounds < len(blocks))] - 1] = True
        starts = np.concatenate([[0], np.flatnonzero(cut) + 1])
        ends = np.append(starts[1:], len(blocks))
        begin, end, firsts = blocks[starts], blocks[ends - 1] + 1, firsts[starts]
        # The keys that each run sees, one run after the other.
        seen = np.searchsorted(keys, firsts)
        counts = np.maximum(np.searchsorted(keys, end) - seen, 0)
        run = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(run)) - np.repeat(counts.cumsum() - counts - seen, counts)
        key = keys[place]
        near, far = np.maximum(begin[run] - key, 0), end[run] - key
        logs = by_distance[far] - by_distance[near] + (far - near) * by_offset[key - firsts[run]]
        group = np.searchsorted(bounds, starts, side="right") - 1
        cells = group[run] * len(keys) + place
        sums = np.bincount(cells, np.minimum(logs, 0), (len(bounds) - 1) * len(keys))
        return sums.reshape(-1, len(keys))


def _group_sums(rows: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """[groups, k]: the sums of rows[bounds[g] : bounds[g + 1]]."""
    result = np.zeros((len(bounds) - 1, rows.shape[1]))
    filled = np.flatnonzero(np.diff(bounds))
    if len(filled):
        result[filled] = np.add.reduceat(rows, bounds[filled])
    return result


def sampled_keys(num_blocks: int, most: int) -> np.ndarray:
    """int64: the middles of `most` equal parts of all blocks, or all blocks."""
    count = min(num_blocks, most)
    return (np.arange(count) * 2 + 1) * num_blocks // max(1, 2 * count)


def as_tiles(tiles: Tiles | np.ndarray) -> Tiles:
    """An array [num_blocks, num_blocks] as `GivenTiles`."""
    return GivenTiles(tiles) if isinstance(tiles, np.ndarray) else tiles


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
    documents: Documents,
    num_blocks: int,
    block_size: int,
    statistics: Statistics | None = None,
    heads: float = 1,
    cells: int = CELLS,
) -> ExpectedTiles:
    """Expected tile work of a batch from its documents and from what earlier plans of a layer group chose.

    Without statistics (or with empty ones) every visible tile counts as 1. Statistics may come from
    another number of blocks. heads, cells: see ExpectedTiles.
    """
    first = first_blocks(documents, num_blocks, block_size)
    if statistics is None or not statistics.rows_by_depth.any():
        nothing, scale = np.zeros(num_blocks, dtype=np.float32), np.ones(num_blocks)
        return ExpectedTiles(first, nothing, nothing, scale, heads, cells)
    missed = tuple(share.astype(np.float32) for share in missed_shares(statistics, num_blocks))
    return ExpectedTiles(first, *missed, work_scale(statistics, *missed), heads, cells)


def expected_columns(
    documents: Documents, num_blocks: int, block_size: int, statistics: Statistics | None = None
) -> np.ndarray:
    """float64 [num_blocks]: expected column work of each query block in tiles, summed over batch rows."""
    if statistics is None or not statistics.rows_by_depth.any():
        return np.zeros(num_blocks)
    depth = np.arange(num_blocks) - first_blocks(documents, num_blocks, block_size)
    return np.where(depth >= 0, columns_at_depth(statistics, depth), 0.0).sum(0)
