"""Pooled block scores, mean query . mean key: the specification, in PyTorch, of triton_pooled.py.

As in MInference (block-sparse heads, arXiv 2407.02490) and MoBA (arXiv 2502.13189). Means are what
travels between holders; sums have one order, so that a mean and a score depend on their own tokens alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import accumulator_dtype
from .block_scores import check_held, check_pair, check_shape
from .geometry import EMPTY, Geometry

__all__ = ["block_means", "pooled_scores"]


def block_means(x: Tensor, geometry: Geometry) -> Tensor:
    """fp32 (fp64 for fp64) [B, H, held blocks, D]: mean of each block's tokens that are no padding.

    x: [B, H, held tokens, D], queries or keys. A block of padding alone gives 0. Raises ValueError for
    other shapes.
    """
    check_held("x", x, geometry)
    real = real_tokens(geometry)
    blocks = (len(geometry.blocks), geometry.block_size)
    total = x.to(accumulator_dtype(x)).masked_fill(~real[:, None, :, None], 0.0).unflatten(2, blocks)
    while total.shape[3] > 1:
        first, second = total.chunk(2, 3)
        total = first + second
    count = real.unflatten(1, blocks).sum(2).clamp(min=1)
    return total.squeeze(3) / count[:, None, :, None]


def pooled_scores(mean_q: Tensor, mean_k: Tensor, geometry: Geometry) -> Tensor:
    """fp32 (fp64 for fp64) [B, H, held blocks, num_blocks]: mean_q . mean_k / sqrt(D).

    Invisible tiles have -inf. mean_q: [B, H, held blocks, D], of the blocks held here; mean_k:
    [B, Hk, num_blocks, D], of all blocks in logical order; both from block_means. Raises ValueError for
    shapes or dtypes that do not fit.
    """
    check_means(mean_q, mean_k, geometry)
    queries = mean_q.unflatten(1, (mean_k.shape[1], -1))
    shape = (*queries.shape[:4], geometry.num_blocks)
    scores = torch.zeros(shape, dtype=mean_q.dtype, device=mean_q.device)
    for d in range(mean_q.shape[3]):  # elementwise: the order of a sum does not depend on the shape
        scores += queries[..., d, None] * mean_k[:, :, None, None, :, d]
    scores = scores.flatten(1, 2) * mean_q.shape[3] ** -0.5
    return scores.masked_fill_((geometry.tile_class == EMPTY)[:, None], -torch.inf)


def real_tokens(geometry: Geometry) -> Tensor:
    """bool [B, held tokens]: whether a token belongs to a document.

    Made on the host by the first call and kept on the geometry: patterns call it before the step starts.
    """

    def build():
        real = torch.zeros(geometry.batch, geometry.num_tokens, dtype=torch.bool)
        for row, ranges in zip(real, geometry.documents, strict=True):
            for start, end in ranges:
                row[start:end] = True
        return real.to(geometry.device)[:, geometry.positions].contiguous()

    return geometry.memo("real_tokens", build)


def check_means(mean_q: Tensor, mean_k: Tensor, geometry: Geometry) -> None:
    """ValueError unless these are means of the held query blocks and of all key blocks."""
    check_shape("mean_q", mean_q, (geometry.batch, len(geometry.blocks)))
    check_shape("mean_k", mean_k, (geometry.batch, geometry.num_blocks))
    check_pair(mean_q, mean_k)
    if mean_q.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"means are {mean_q.dtype}; use torch.float32 or torch.float64, as of block_means")
