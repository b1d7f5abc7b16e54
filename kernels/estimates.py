"""What estimates compute on probe rows and keys: the specification, in PyTorch, of triton_estimates.py.

Probabilities become integers, so that every sum over them is exact in any order, and scores are computed
in one fixed shape: a result does not depend on who holds which keys. The operations are peaks, totals,
masses, tiles_of_diagonals and, of select.py, top_k and threshold.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .geometry import EMPTY, Geometry
from .plan import pack_bits
from .select import ID_BITS, threshold, top_k

__all__ = ["masses", "operations", "peaks", "threshold", "tiles_of_diagonals", "top_k", "totals"]

FIXED = 2**30  # a probability of 1 in fixed point
LOG2E = math.log2(math.e)
_PAIRS = 32  # (window, key block) pairs scored in one matrix product


@dataclass(frozen=True)
class Probes:
    """W windows of P probe queries and the T (window, held key block) pairs in which they see keys.

    rows: int64 [W, P] logical positions of the queries, consecutive, -1 beyond a short window.
    window_batch: int64 [W]. token: int64 [W, P] where the queries are held here, -1 elsewhere.
    bounds: int32 [2, W, P], the visible interval (lo, hi) of the queries, or [4, W, P] with a prefix.
    pairs: int64 [T, 4], window, physical slot, logical block and batch row of every pair with a visible
        key, sorted by window and then by block.
    """

    block_size: int
    num_blocks: int
    rows: Tensor
    window_batch: Tensor
    token: Tensor
    bounds: Tensor
    pairs: Tensor


def operations(x: Tensor) -> ModuleType:
    """The module that computes estimates on tensors like x: the kernels on a GPU, else this one."""
    has_triton = importlib.util.find_spec("triton") is not None
    kernels = x.is_cuda and has_triton and x.dtype != torch.float64
    return importlib.import_module(".triton_estimates" if kernels else ".estimates", __package__)


def peaks(rows: Tensor, k: Tensor, probes: Probes) -> Tensor:
    """fp32 (fp64 for fp64 keys) [W, H, P]: highest score against the keys held here, -inf without any.

    Scores are in base 2: 2^score is what exp(score) is usually.
    rows: [W, H, P, D] probe queries. k: [B, Hk, held tokens, D].
    """
    scores = _scores(rows, k, probes)
    high = scores.new_full(rows.shape[:3], -torch.inf)
    index = probes.pairs[:, 0, None, None].expand(-1, *rows.shape[1:3])
    return high.scatter_reduce_(0, index, scores.amax(3), "amax")


def totals(rows: Tensor, k: Tensor, peak: Tensor, probes: Probes) -> Tensor:
    """int64 [W, H, P]: sum of 2^(score - peak) over the keys held here, in fixed point."""
    weights = _fixed(_exponentials(rows, k, peak, probes))
    return _sum_by_window(weights.sum(3), probes)


def masses(
    rows: Tensor, k: Tensor, peak: Tensor, share: Tensor, tail: Tensor, probes: Probes
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities 2^(score - peak) * share of the keys held here, in fixed point, summed in three ways.

    share: like peak, 1 / the sum of all exponentials. tail: int64 [T, block], encode() of every key
    without its mass, -1 for keys that cannot be columns. Returns
    slash: int64 [W, H, num_blocks], on each block diagonal, in units of 1 / (FIXED * block);
    far: int64 [W, H], on all keys that may be columns;
    codes: int64 [H, T * block], encode() of what each such key catches from all rows, -1 for others.
    """
    weights = _exponentials(rows, k, peak, probes)
    mass = _fixed(weights.mul_(share[probes.pairs[:, 0]][..., None]))
    vertical = mass.sum(2)  # [T, H, block]
    able = (tail >= 0)[:, None]
    codes = torch.where(able, (vertical << ID_BITS) + tail[:, None], -1)
    far = _sum_by_window(vertical.masked_fill(~able, 0).sum(2), probes)
    return _diagonal_mass(mass, probes), far, codes.transpose(0, 1).flatten(1)


def tiles_of_diagonals(chosen: Tensor, geometry: Geometry, local: int, window_of_row: Tensor) -> Tensor:
    """int32 [B, H, held blocks, words], the visible tiles on chosen block diagonals, as a plan holds them.

    chosen: bool [W, H, num_blocks], diagonals of each window. local: the first ones that are always taken.
    window_of_row: int64 [B, held blocks, depth], windows that choose for a row, W for none.
    """
    chosen = torch.nn.functional.pad(chosen, (0, 0, 0, 0, 0, 1))  # last: no window
    distance = geometry.block_ids[:, None] - torch.arange(geometry.num_blocks, device=chosen.device)
    reach = distance.clamp(min=0).expand(geometry.batch, chosen.shape[1], -1, -1)
    tiles = (distance < local).expand_as(reach)
    for index in window_of_row.unbind(2):
        tiles = tiles | torch.gather(chosen[index].transpose(1, 2), 3, reach)
    return pack_bits(tiles & (distance >= 0) & (geometry.tile_class != EMPTY)[:, None])


def _scores(rows: Tensor, k: Tensor, probes: Probes) -> Tensor:
    """fp32 (fp64 for fp64 keys) [T, H, P, block] scores of every pair in base 2, -inf where invisible."""
    size, dim = probes.block_size, k.shape[3]
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    heads, kv_heads = rows.shape[1], k.shape[1]
    keys = k.unflatten(2, (k.shape[2] // size, size))
    rows = rows.to(dtype).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [W, Hk, (H / Hk) * P, D]
    pairs, chunks = len(probes.pairs), []
    window, slot, block, batch = probes.pairs.unbind(1)
    for start in range(0, pairs, _PAIRS):
        # The last chunk is filled up, so that every product has one shape and so one summation order.
        index = (torch.arange(start, start + _PAIRS, device=k.device)).clamp(max=pairs - 1)
        key = keys[batch[index], :, slot[index]].to(dtype)
        product = torch.bmm(rows[window[index]].flatten(0, 1), key.flatten(0, 1).mT)
        chunks.append(product.unflatten(0, (_PAIRS, kv_heads))[: pairs - start])
    if not chunks:
        return torch.empty(0, heads, probes.rows.shape[1], size, dtype=dtype, device=k.device)
    scores = torch.cat(chunks).view(pairs, heads, -1, size) * (dim**-0.5 * LOG2E)
    keys_at = (block[:, None] * size + torch.arange(size, device=k.device))[:, None]
    visible = torch.zeros((), dtype=torch.bool, device=k.device)
    for lo, hi in probes.bounds[:, window, :, None].split(2):
        visible = visible | ((lo <= keys_at) & (keys_at <= hi))
    return scores.masked_fill_(~visible[:, None], -torch.inf)


def _exponentials(rows: Tensor, k: Tensor, peak: Tensor, probes: Probes) -> Tensor:
    """2^(score - peak) of every pair, in [0, 1]."""
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    # Not exp2, which on CPUs rounds the last elements of a tensor differently from the others.
    exponents = _scores(rows, k, probes).sub_(peak[probes.pairs[:, 0]][..., None])
    return exponents.mul_(math.log(2)).exp_()


def _fixed(x: Tensor) -> Tensor:
    """int32: values in [0, 1] in fixed point, FIXED for 1, to the nearest."""
    return (x * FIXED).add_(0.5).int()


def _sum_by_window(x: Tensor, probes: Probes) -> Tensor:
    """int64 [T, ...] -> [W, ...]."""
    total = x.new_zeros(len(probes.rows), *x.shape[1:])
    return total.index_add_(0, probes.pairs[:, 0], x)


def _diagonal_mass(mass: Tensor, probes: Probes) -> Tensor:
    """int64 [W, H, num_blocks]: probability on each block diagonal, in units of 1 / (FIXED * block).

    mass: int32 [T, H, P, block]. Attention along token distance d falls, over the queries of a block, on
    the block diagonals around d with triangular weights; a diagonal is worth what all its tiles catch.
    """
    size, length = probes.block_size, mass.shape[2]
    # Shear the tile so that equal distances (row - column) share a column, then add the rows.
    span = length + size - 1
    sheared = torch.nn.functional.pad(mass.flip(3), (0, length)).flatten(2)[..., : length * span]
    by_distance = sheared.unflatten(2, (length, span)).sum(2)  # column u: row - column = u - (size - 1)
    window, _, block, _ = probes.pairs.unbind(1)
    base = probes.rows[window, 0] - block * size  # distance of row 0 and column 0
    offset = (base % size)[:, None] + torch.arange(span, device=mass.device) - (size - 1)
    bins = torch.arange(-1, (size + length - 2) // size + 2, device=mass.device)
    weight = (size - (offset[..., None] - bins * size).abs()).clamp(min=0)  # [T, span, bins]
    # Integers below 2^53 in fp64: the product is exact.
    binned = (by_distance.double() @ weight.double()).long()  # [T, H, bins]
    diagonal = ((base // size)[:, None] + bins).clamp(0, probes.num_blocks - 1)
    total = binned.new_zeros(len(probes.rows) * probes.num_blocks, mass.shape[1])
    place = (window[:, None] * probes.num_blocks + diagonal).flatten()
    total.index_add_(0, place, binned.transpose(1, 2).flatten(0, 1))
    return total.unflatten(0, (-1, probes.num_blocks)).transpose(1, 2).contiguous()
