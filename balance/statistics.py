"""What the plans of a step tell about the next batch: how tiles depend on distance and on offset.

Attention patterns mix slashes (tiles at some distance from the query) and columns (keys at some offset
in their document that many queries choose). So a step is summed up by a few vectors over distance,
offset and depth, and a tile of the next batch is taken to be missed by both independently:

    P(tile chosen) = 1 - missed_by_distance[distance] * missed_by_offset[offset]

which is exact for slashes alone, for columns alone and for their union; how much query blocks choose in all
is kept by depth, since a rule such as "the best k" makes that differ. Everything is counted in blocks:
distance = query block - key block, offset = key block - first block, depth = query block - first block,
where the first block is the first that the query block can see (of its earliest document).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

ROUNDS = 10  # of proportional fitting; the error of the marginals falls about tenfold in two rounds
PRIOR = 0.01  # tiles added to both sides of an offset's share, as a share of its visible tiles


def layer_groups(world: int) -> int:
    """Of how many groups of consecutive layers, at most, the plans are summed up apart.

    One where so many ranks share a sequence that groups gain nothing and planning for each takes too long
    (benchmarks/balance_groups.py).
    """
    return 4 if world <= 32 else 1


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over query blocks, batch rows, layers and ranks; only their ratios matter. float64 [n] each.

    Or [groups, n] each, where layers are summed up in groups.

    rows_by_depth: number of query blocks at each depth. chosen_by_distance, chosen_by_offset: chosen
    visible tiles, averaged over heads. columns_by_depth: column work outside chosen tiles, averaged over
    heads, in tiles (one column for one query block is 1 / block_size). tiles_by_depth: chosen visible tiles,
    averaged over heads.
    """

    rows_by_depth: np.ndarray
    chosen_by_distance: np.ndarray
    chosen_by_offset: np.ndarray
    columns_by_depth: np.ndarray
    tiles_by_depth: np.ndarray

    @staticmethod
    def zeros(num_blocks: int) -> Statistics:
        """Nothing seen yet."""
        return Statistics.from_vector(np.zeros(5 * num_blocks))

    @staticmethod
    def from_vector(vector: np.ndarray) -> Statistics:
        """The inverse of `to_vector`."""
        return Statistics(*np.split(np.asarray(vector, dtype=np.float64), 5, axis=-1))

    def to_vector(self) -> np.ndarray:
        """float64 [5 * n] or [groups, 5 * n]: what an all-reduce over the ranks (a plain sum) may combine."""
        return np.concatenate([getattr(self, field.name) for field in fields(self)], axis=-1)

    def by_group(self) -> list[Statistics]:
        """Those of each group of layers."""
        return list(map(Statistics.from_vector, np.atleast_2d(self.to_vector())))

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics.from_vector(self.to_vector() + other.to_vector())


def measure(
    chosen: np.ndarray, columns: np.ndarray, query_blocks: np.ndarray, first_blocks: np.ndarray
) -> Statistics:
    """Statistics of one batch row of one plan; on a device each field is one index_add.

    chosen: float [nq, num_blocks], share of heads that choose the tile. columns: float [nq], column work
    of each query block in tiles. query_blocks: int [nq], logical ids. first_blocks: int [nq], the first
    block each can see (larger than its own id: it sees nothing and is not counted).
    """
    num_blocks = chosen.shape[1]
    keys = np.arange(num_blocks)
    depth = query_blocks - first_blocks
    seen = depth >= 0
    distance, offset = query_blocks[:, None] - keys, keys - first_blocks[:, None]
    visible = (distance >= 0) & (offset >= 0)
    return Statistics(
        np.bincount(depth[seen], minlength=num_blocks).astype(np.float64),
        np.bincount(distance[visible], chosen[visible], num_blocks),
        np.bincount(offset[visible], chosen[visible], num_blocks),
        np.bincount(depth[seen], columns[seen], num_blocks),
        np.bincount(depth[seen], (chosen * visible).sum(1)[seen], num_blocks),
    )


def missed_shares(statistics: Statistics, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """(missed_by_distance, missed_by_offset), float64 [num_blocks] each, fitted to the statistics.

    Both marginals are matched by proportional fitting over the tiles that were visible; since every
    query block sees all blocks back to its first, rows_by_depth says how many tiles there were at each
    (distance, offset). What distance can explain is left to it: a small prior pulls offsets to 1.
    Distances and offsets beyond those seen go on like the far half of those seen. The shares are rounded,
    so that the last bits of an FFT never decide anything.
    """
    seen = np.flatnonzero(statistics.rows_by_depth)[-1] + 1
    rows = statistics.rows_by_depth[:seen]
    visible = rows[::-1].cumsum()[::-1]  # tiles at each distance, and as many at each offset
    missed_at_distance = np.maximum(visible - statistics.chosen_by_distance[:seen], 0)
    missed_at_offset = np.maximum(visible - statistics.chosen_by_offset[:seen], 0)
    prior = PRIOR * visible
    by_offset = np.ones(seen)
    spectrum = np.fft.rfft(rows, _padded(seen))
    for _ in range(ROUNDS):
        by_distance = missed_at_distance / _pair_sums(spectrum, by_offset)
        by_offset = (missed_at_offset + prior) / (_pair_sums(spectrum, by_distance) + prior)
    scale = np.average(by_offset, weights=visible)
    return (
        _extend(by_distance * scale, visible, num_blocks),
        _extend(by_offset / scale, visible, num_blocks),
    )


def tiles_at_depth(missed_by_distance: np.ndarray, missed_by_offset: np.ndarray) -> np.ndarray:
    """float64 [num_blocks]: expected tiles of a query block at each depth, from `missed_shares`."""
    spectrum = np.fft.rfft(missed_by_distance[::-1], _padded(len(missed_by_offset)))
    missed = _pair_sums(spectrum, missed_by_offset)[::-1]
    return np.arange(1, len(missed) + 1) - missed


def work_scale(
    statistics: Statistics, missed_by_distance: np.ndarray, missed_by_offset: np.ndarray
) -> np.ndarray:
    """float64 [num_blocks]: by depth, tiles that were chosen over those that the shares make expected."""
    expected = tiles_at_depth(*(x.astype(np.float64) for x in (missed_by_distance, missed_by_offset)))
    seen = np.flatnonzero(statistics.rows_by_depth[: len(expected)])
    modelled = np.maximum(statistics.rows_by_depth[seen] * expected[seen], 1e-9)
    scale = statistics.tiles_by_depth[seen] / modelled
    return np.interp(np.arange(len(expected)), seen, scale).round(6)


def columns_at_depth(statistics: Statistics, depth: np.ndarray) -> np.ndarray:
    """float64, shape of depth: expected column work in tiles of a query block at each depth >= 0."""
    seen = np.flatnonzero(statistics.rows_by_depth)
    return np.interp(depth, seen, statistics.columns_by_depth[seen] / statistics.rows_by_depth[seen])


def _pair_sums(spectrum: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """For each x the sum over y of rows[x + y] * weights[y]. spectrum: of rows with zeros behind them."""
    size = _padded(len(weights))
    return np.fft.irfft(spectrum * np.fft.rfft(weights, size).conj(), size)[: len(weights)]


def _padded(count: int) -> int:
    """A power of two, for which transforms are fast, of at least twice as many less one."""
    return 1 << (2 * int(count) - 1).bit_length()


def _extend(share: np.ndarray, visible: np.ndarray, num_blocks: int) -> np.ndarray:
    """[num_blocks]: the shares that were seen, then the mean of their far half."""
    far = slice(len(share) // 2, None)
    beyond = np.average(share[far], weights=visible[far])
    return np.append(share, np.full(max(num_blocks - len(share), 0), beyond))[:num_blocks].round(6)
