"""Antidiagonal block scores: the specification, in PyTorch, of triton_antidiagonal.py.

XAttention (arXiv 2503.16428): every S = `stride` consecutive tokens are a group. Query group i scores
against key group j by the sum over t of q[i S + S - 1 - t] . k[j S + t] / (S sqrt(D)), an antidiagonal of
the S x S products of their tokens; a tile is worth the softmax probabilities of its pairs of groups.

Queries stay and keys travel: every operation takes any part of the keys. Results of the parts combine by
maximum, sum and concatenation, bit for bit whatever the parts, because probabilities become integers and
scores are computed in one fixed shape.

A key group is visible to a query group if it touches the smallest interval around what the queries of the
group see, prefixes apart: the rule by which Geometry calls a tile EMPTY. Under causal, document, window and
prefix masks that means: some query of the group sees some key of the other. As in the paper, a visible pair
is scored by all its tokens, invisible ones and padding included; make padding 0 if it shall not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .attention import accumulator_dtype
from .block_scores import check_held, check_pair, check_shape
from .estimates import FIXED, LOG2E
from .geometry import Geometry

__all__ = ["masses", "peaks", "totals"]

STRIDES = (4, 8, 16)
GROUPS = 128  # most groups in a block: kernels score them together
_PAIRS = 32  # (query block, key block) pairs scored in one matrix product


def peaks(q: Tensor, k: Tensor, blocks: Tensor, geometry: Geometry, stride: int) -> Tensor:
    """fp32 (fp64 for fp64) [B, H, held groups]: highest score against these keys, -inf without any.

    Scores are in base 2: 2^score is what exp(score) is usually.
    q: [B, H, held tokens, D], of the blocks that the geometry holds. k: [B, Hk, T * block, D], keys of any
    T blocks one after the other; blocks: int64 [T], their logical ids. stride: 4, 8 or 16 tokens.
    Raises ValueError for shapes, dtypes and strides that do not fit.
    """
    check(q, k, blocks, geometry, stride)
    high = q.new_full(held_groups(q, stride), -torch.inf, dtype=accumulator_dtype(q))
    high = _by_row(high, geometry, stride)
    for row, _, scores in _tiles(q, k, blocks, geometry, stride):
        index = row[:, None, None, None].expand(-1, *high.shape[1:])
        high.scatter_reduce_(0, index, scores.amax(4), "amax")
    return high.permute(1, 2, 0, 3).flatten(2)


def totals(q: Tensor, k: Tensor, blocks: Tensor, peak: Tensor, geometry: Geometry, stride: int) -> Tensor:
    """int64 [B, H, held groups]: sum of 2^(score - peak) over these keys, in fixed point.

    peak: of all keys, the maximum of the peaks of their parts; the others as for peaks.
    """
    check(q, k, blocks, geometry, stride)
    peak = _by_row(peak, geometry, stride)
    total = _by_row(q.new_zeros(held_groups(q, stride), dtype=torch.int64), geometry, stride)
    for row, _, scores in _tiles(q, k, blocks, geometry, stride):
        total.index_add_(0, row, _fixed(_exponentials(scores, peak[row])).sum(4))
    return total.permute(1, 2, 0, 3).flatten(2)


def masses(
    q: Tensor, k: Tensor, blocks: Tensor, peak: Tensor, total: Tensor, geometry: Geometry, stride: int
) -> Tensor:
    """int32 [B, H, held blocks, T]: probability of each of these key blocks, in fixed point.

    It is the mean over the groups of the query block, where a group that sees nothing has 0: the masses of
    all key blocks add up to FIXED, but for rounding, if all groups see keys.
    peak, total: of all keys, the maximum and the sum of those of their parts; the others as for peaks.
    """
    check(q, k, blocks, geometry, stride)
    peak, share = (_by_row(x, geometry, stride) for x in (peak, share_of(total, peak)))
    mass = torch.zeros(len(peak), len(blocks), *q.shape[:2], dtype=torch.int32, device=q.device)
    for row, slot, scores in _tiles(q, k, blocks, geometry, stride):
        weights = _exponentials(scores, peak[row]).mul_(share[row, ..., None])
        mass[row, slot] = mean_of(_fixed(weights).sum((3, 4)), geometry.block_size // stride)
    return mass.permute(2, 3, 0, 1).contiguous()


def share_of(total: Tensor, peak: Tensor) -> Tensor:
    """1 / the sum of all exponentials of a query group, in the dtype of its peak."""
    return (FIXED / total.clamp(min=1).double()).to(peak.dtype)


def mean_of(mass: Tensor, groups: int) -> Tensor:
    """int32: the sum over the groups of a block divided by their number, to the nearest."""
    return ((mass + groups // 2) // groups).int()


def held_groups(q: Tensor, stride: int) -> tuple[int, int, int]:
    """Shape of what every query group has: [B, H, held groups]."""
    return (*q.shape[:2], q.shape[2] // stride)


def group_bounds(geometry: Geometry, stride: int) -> Tensor:
    """int32 [2, B, held groups], or [4, ...] with a prefix: (low, high) of each query group.

    Key groups that begin at a token in [low, high] are visible to it. Kept on the geometry.
    """

    def build():
        bounds = []
        for lo, hi in geometry.intervals:
            groups = (lo.shape[1] // stride, stride)
            bounds += [lo.unflatten(1, groups).amin(2) - (stride - 1), hi.unflatten(1, groups).amax(2)]
        return torch.stack(bounds)

    return geometry.memo(("group_bounds", stride), build)


def check(q: Tensor, k: Tensor, blocks: Tensor, geometry: Geometry, stride: int) -> None:
    """ValueError unless queries, keys, ids and stride fit each other and the geometry."""
    size = geometry.block_size
    if stride not in STRIDES:
        raise ValueError(f"stride {stride} does not fit blocks of {size} tokens; use one of {STRIDES}")
    if size // stride > GROUPS:
        raise ValueError(
            f"stride {stride} cuts blocks of {size} tokens into {size // stride} groups, more than {GROUPS}; "
            f"use blocks of {GROUPS * stride} tokens, or a larger stride of {STRIDES}"
        )
    check_held("q", q, geometry)
    check_shape("k", k, (geometry.batch, blocks.numel() * size))
    check_pair(q, k)


def _tiles(
    q: Tensor, k: Tensor, blocks: Tensor, geometry: Geometry, stride: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """All tiles of held rows and these key blocks, up to _PAIRS at a time.

    int64 [P] rows, int64 [P] places of the key blocks, and [P, B, H, groups, groups] scores in base 2,
    fp32 (fp64 for fp64), -inf where invisible.
    """
    size, pairs = geometry.block_size, len(geometry.blocks) * len(blocks)
    if not pairs:
        return
    # [blocks, B, heads, groups, stride * D]: the tokens of a group follow each other
    queries, keys = (
        x.to(accumulator_dtype(x)).unflatten(2, (-1, size // stride, stride)).movedim(2, 0) for x in (q, k)
    )
    queries, keys = queries.flip(4).flatten(4), keys.flatten(4)
    begin = blocks[:, None] * size + torch.arange(0, size, stride, device=k.device)
    bounds = group_bounds(geometry, stride).unflatten(2, (len(geometry.blocks), -1))
    for start in range(0, pairs, _PAIRS):
        # The last product is filled up, so that all have one shape and so one summation order.
        index = torch.arange(start, start + _PAIRS, device=k.device).clamp(max=pairs - 1)
        row, slot = index // len(blocks), index % len(blocks)
        left, right = queries[row], keys[slot]
        heads_of_key = left.unflatten(2, (k.shape[1], -1)).flatten(3, 4)
        scores = torch.bmm(heads_of_key.flatten(0, 2), right.flatten(0, 2).mT)
        scores = scores.view(*left.shape[:4], -1) * (q.shape[3] ** -0.5 / stride * LOG2E)
        seen = torch.zeros((), dtype=torch.bool, device=k.device)
        for low, high in bounds[:, :, row].transpose(1, 2)[..., None].split(2):
            at = begin[slot][:, None, None]  # [P, 1, 1, key groups]; low, high: [P, B, query groups, 1]
            seen = seen | ((low <= at) & (at <= high))
        scores.masked_fill_(~seen[:, :, None], -torch.inf)
        count = min(_PAIRS, pairs - start)
        yield row[:count], slot[:count], scores[:count]


def _by_row(x: Tensor, geometry: Geometry, stride: int) -> Tensor:
    """[B, H, held groups] as [held blocks, B, H, groups]."""
    return x.unflatten(2, (len(geometry.blocks), geometry.block_size // stride)).permute(2, 0, 1, 3)


def _exponentials(scores: Tensor, peak: Tensor) -> Tensor:
    """2^(score - peak), in [0, 1]."""
    # Not exp2, which on CPUs rounds the last elements of a tensor differently from the others.
    shift = peak.masked_fill(peak == -torch.inf, 0.0)[..., None]
    return scores.sub_(shift).mul_(math.log(2)).exp_()


def _fixed(x: Tensor) -> Tensor:
    """int32: values in [0, 1] in fixed point, FIXED for 1, to the nearest."""
    return (x * FIXED).add_(0.5).int()
