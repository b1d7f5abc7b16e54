"""Probe windows: the last queries of every document (or segment of it) scored against all its keys.

Scores are computed tile by tile in one fixed shape, and probabilities become integers, so that every
sum over them is exact in any order: the result does not depend on who holds which keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import Geometry

FIXED = 2**30  # a probability of 1 in fixed point
_PAIRS = 32  # (window, key block) pairs scored in one matrix product


@dataclass(frozen=True)
class Window:
    """Queries [start, end) whose choice one probe makes. The probe is the last tokens of the range."""

    batch: int
    document: int  # first token of the document: keys [document, end) are visible to the probe
    start: int
    end: int
    group: int  # segment number, 0 without segments


@dataclass(frozen=True)
class Probes:
    """Windows of a batch and where their pieces lie; everything known before values are.

    rows: int64 [W, P] logical positions of the probe's queries, -1 beyond a short window.
    pair_window, pair_slot, pair_block: int64 [T], every (window, held key block) pair with a visible
        key, sorted by window and then by logical block; slot is physical.
    window_batch: int64 [W] and pair_batch: int64 [T], their batch rows.
    """

    windows: tuple[Window, ...]
    rows: Tensor
    window_batch: Tensor
    pair_window: Tensor
    pair_slot: Tensor
    pair_block: Tensor
    pair_batch: Tensor


def find_windows(geometry: Geometry, segment: int | None, local: int) -> tuple[Window, ...]:
    """One window per document, or per piece of it inside segments of `segment` tokens.

    Pieces whose keys all lie in the `local` block diagonals nearest to their queries need no probe.
    """
    size, windows = geometry.block_size, []
    for batch, ranges in enumerate(geometry.documents):
        for document, end in ranges:
            cut = segment or geometry.num_tokens
            for start in range(document - document % cut, end, cut):
                piece = (max(start, document), min(start + cut, end))
                if (piece[1] - 1) // size - document // size >= local:
                    windows.append(Window(batch, document, *piece, start // cut))
    return tuple(windows)


def make_probes(geometry: Geometry, segment: int | None, local: int, length: int) -> Probes:
    """Tables of the windows of `length` probe queries each, on the device of the geometry."""
    size = geometry.block_size
    windows = find_windows(geometry, segment, local)
    rows, pairs = [], []
    held = sorted((block, slot) for slot, block in enumerate(geometry.blocks))
    for index, w in enumerate(windows):
        first = max(w.start, w.end - length)
        rows.append([*range(first, w.end), *[-1] * (length - (w.end - first))])
        for block, slot in held:
            if block * size < w.end and (block + 1) * size > w.document:
                pairs.append((index, slot, block, w.batch))
    columns = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 4).T.contiguous().to(geometry.device)
    rows = torch.tensor(rows, dtype=torch.int64).reshape(-1, length).to(geometry.device)
    window_batch = torch.tensor([w.batch for w in windows], dtype=torch.int64, device=rows.device)
    return Probes(windows, rows, window_batch, *columns)


def gather_rows(q: Tensor, geometry: Geometry, probes: Probes) -> Tensor:
    """[W, H, P, D] probe queries, zeros where not held here: the holders' sum is the whole probe."""
    if not geometry.blocks:
        return q.new_zeros(len(probes.windows), q.shape[1], probes.rows.shape[1], q.shape[3])
    size = geometry.block_size
    slot = torch.full((geometry.num_blocks,), -1, dtype=torch.int64, device=q.device)
    slot[geometry.block_ids] = torch.arange(len(geometry.blocks), device=q.device)
    place = slot[probes.rows.clamp(min=0) // size]
    here = (place >= 0) & (probes.rows >= 0)
    token = place.clamp(min=0) * size + probes.rows.clamp(min=0) % size
    rows = q[probes.window_batch[:, None], :, token] * here[..., None, None]
    return rows.transpose(1, 2).contiguous()


def score(rows: Tensor, k: Tensor, geometry: Geometry, probes: Probes) -> Tensor:
    """fp32 (fp64 for fp64 keys) [T, H, P, block] scores of every pair, -inf where invisible."""
    size, dim = geometry.block_size, k.shape[3]
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    heads, kv_heads = rows.shape[1], k.shape[1]
    keys = k.unflatten(2, (len(geometry.blocks), size))
    rows = rows.to(dtype).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [W, Hk, (H / Hk) * P, D]
    pairs, chunks = len(probes.pair_window), []
    for start in range(0, pairs, _PAIRS):
        # The last chunk is filled up, so that every product has one shape and so one summation order.
        index = (torch.arange(start, start + _PAIRS, device=k.device)).clamp(max=pairs - 1)
        key = keys[probes.pair_batch[index], :, probes.pair_slot[index]].to(dtype)
        product = torch.bmm(rows[probes.pair_window[index]].flatten(0, 1), key.flatten(0, 1).mT)
        chunks.append(product.unflatten(0, (_PAIRS, kv_heads))[: pairs - start])
    if not chunks:
        return torch.empty(0, heads, probes.rows.shape[1], size, dtype=dtype, device=k.device)
    scores = torch.cat(chunks).view(pairs, heads, -1, size) * dim**-0.5
    keys_at = probes.pair_block[:, None] * size + torch.arange(size, device=k.device)
    visible = torch.zeros((), dtype=torch.bool, device=k.device)
    at = (probes.pair_batch[:, None], probes.rows[probes.pair_window].clamp(min=0))
    for lo, hi in ((geometry.lo, geometry.hi), (geometry.prefix_lo, geometry.prefix_hi)):
        if lo is not None:
            visible = visible | (
                (lo[at][..., None] <= keys_at[:, None]) & (keys_at[:, None] <= hi[at][..., None])
            )
    visible = visible & (probes.rows[probes.pair_window] >= 0)[..., None]
    return scores.masked_fill_(~visible[:, None], -torch.inf)


def peak(scores: Tensor, probes: Probes) -> Tensor:
    """[W, H, P] highest local score of every probe query, -inf where it sees no key held here."""
    high = scores.new_full((len(probes.windows), *scores.shape[1:3]), -torch.inf)
    index = probes.pair_window[:, None, None].expand(-1, *scores.shape[1:3])
    return high.scatter_reduce_(0, index, scores.amax(3), "amax")


def exponentials(scores: Tensor, high: Tensor, probes: Probes) -> Tensor:
    """exp(score - peak) of every pair, in [0, 1]."""
    high = high.masked_fill(high == -torch.inf, 0.0)
    return (scores - high[probes.pair_window][..., None]).exp_()


def fixed(x: Tensor) -> Tensor:
    """Fixed point with FIXED as 1."""
    return (x.double() * FIXED).round_().long()


def sum_by_window(x: Tensor, probes: Probes) -> Tensor:
    """int64 [T, ...] -> [W, ...]."""
    total = x.new_zeros(len(probes.windows), *x.shape[1:])
    return total.index_add_(0, probes.pair_window, x)


def diagonal_mass(mass: Tensor, geometry: Geometry, probes: Probes) -> Tensor:
    """int64 [W, H, num_blocks]: probability on each block diagonal, in units of 1 / (FIXED * block).

    mass: int64 [T, H, P, block]. Attention along token distance d falls, over the queries of a block, on
    the block diagonals around d with triangular weights; a diagonal is worth what all its tiles catch.
    """
    size, length = geometry.block_size, mass.shape[2]
    # Shear the tile so that equal distances (row - column) share a column, then add the rows.
    span = length + size - 1
    sheared = torch.nn.functional.pad(mass.flip(3), (0, length)).flatten(2)[..., : length * span]
    by_distance = sheared.unflatten(2, (length, span)).sum(2)  # column u: row - column = u - (size - 1)
    first = probes.rows[:, 0][probes.pair_window]
    base = first - probes.pair_block * size  # distance of row 0 and column 0
    offset = (base % size)[:, None] + torch.arange(span, device=mass.device) - (size - 1)
    bins = torch.arange(-1, (size + length - 2) // size + 2, device=mass.device)
    weight = (size - (offset[..., None] - bins * size).abs()).clamp(min=0)  # [T, span, bins]
    # Integers below 2^53 in fp64: the product is exact.
    binned = (by_distance.double() @ weight.double()).long()  # [T, H, bins]
    diagonal = ((base // size)[:, None] + bins).clamp(0, geometry.num_blocks - 1)
    total = mass.new_zeros(len(probes.windows) * geometry.num_blocks, mass.shape[1])
    place = (probes.pair_window[:, None] * geometry.num_blocks + diagonal).flatten()
    total.index_add_(0, place, binned.transpose(1, 2).flatten(0, 1))
    return total.unflatten(0, (-1, geometry.num_blocks)).transpose(1, 2).contiguous()
