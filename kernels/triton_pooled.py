"""Pooled block scores as Triton kernels; the specification is pooled.py.

A mean is summed by halves, as there, so that it is the same in every bit; scores are full fp32 products.
Tiles have fixed shapes and no count makes a kernel compile anew, so that a result depends on its own
tokens alone, whatever else is held.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_scores import check_held
from .geometry import EMPTY, Geometry
from .pooled import check_means, real_tokens
from .triton_forward import INTERPRET, launch

__all__ = ["block_means", "pooled_scores"]

COUNTS = ["heads", "kv_heads", "blocks", "rows", "num_blocks", "row_tiles", "key_tiles"]
_EMPTY = tl.constexpr(EMPTY)


def block_means(x: Tensor, geometry: Geometry) -> Tensor:
    """fp32 [B, H, held blocks, D]: as in pooled.py."""
    check_held("x", x, geometry)
    batch, heads, _, dim = x.shape
    blocks, size = len(geometry.blocks), geometry.block_size
    means = torch.empty(batch, heads, blocks, dim, device=x.device)
    width = min(triton.next_power_of_2(dim), max(16, min(64, 8192 // size)))
    arguments = (x.contiguous(), real_tokens(geometry).view(torch.uint8), means, heads, blocks)
    programs = batch * heads * blocks * -(-dim // width)
    launch(_means, programs, x, arguments, HALVINGS=size.bit_length() - 1, DIM=dim, WIDTH=width, num_warps=4)
    return means


def pooled_scores(mean_q: Tensor, mean_k: Tensor, geometry: Geometry) -> Tensor:
    """fp32 [B, H, held blocks, num_blocks]: as in pooled.py."""
    check_means(mean_q, mean_k, geometry)
    batch, heads, rows, dim = mean_q.shape
    kv_heads, num_blocks = mean_k.shape[1:3]
    scores = torch.empty(batch, heads, rows, num_blocks, device=mean_q.device)
    size = 16 if INTERPRET else 64
    tiles = -(-rows // size), -(-num_blocks // size)
    arguments = (mean_q.contiguous(), mean_k.contiguous(), geometry.tile_class, scores, dim**-0.5)
    launch(
        _scores,
        batch * heads * tiles[0] * tiles[1],
        mean_q,
        (*arguments, heads, kv_heads, rows, num_blocks, *tiles),
        DIM=dim,
        SIZE=size,
        WIDTH=32,
        num_warps=8,
        num_stages=2,
    )
    return scores


@triton.jit(do_not_specialize=COUNTS)
def _means(x, real, means, heads, blocks, HALVINGS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """One program for every block of 2^HALVINGS tokens of a head and WIDTH of its DIM columns."""
    BLOCK: tl.constexpr = 1 << HALVINGS
    PARTS: tl.constexpr = (DIM + WIDTH - 1) // WIDTH
    column = tl.program_id(0) % PARTS * WIDTH + tl.arange(0, WIDTH)
    number = (tl.program_id(0) // PARTS).to(tl.int64)  # of the block, over batch and heads
    inside = tl.arange(0, BLOCK)
    row = number // blocks // heads * blocks + number % blocks
    kept = tl.load(real + row * BLOCK + inside) != 0
    places = x + number * BLOCK * DIM + inside[:, None] * DIM + column[None, :]
    total = tl.load(places, mask=kept[:, None] & (column < DIM)[None, :], other=0.0).to(tl.float32)
    for i in tl.static_range(HALVINGS):
        total = tl.sum(tl.reshape(total, [2, BLOCK >> (i + 1), WIDTH]), 0)
    mean = tl.div_rn(tl.reshape(total, [WIDTH]), tl.maximum(tl.sum(kept.to(tl.int32)), 1).to(tl.float32))
    tl.store(means + number * DIM + column, mean, mask=column < DIM)


@triton.jit(do_not_specialize=COUNTS)
def _scores(
    mean_q, mean_k, tile_class, scores, scale, heads, kv_heads, rows, num_blocks, row_tiles, key_tiles,
    DIM: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """One program for SIZE query blocks and SIZE key blocks of a head."""
    key = tl.program_id(0) % key_tiles * SIZE + tl.arange(0, SIZE)
    rest = tl.program_id(0) // key_tiles
    row = rest % row_tiles * SIZE + tl.arange(0, SIZE)
    head = (rest // row_tiles).to(tl.int64)  # over the batch
    members = heads // kv_heads
    left = mean_q + (head * rows + row[:, None]) * DIM
    right = mean_k + (head // members * num_blocks + key[:, None]) * DIM
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for start in range(0, DIM, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        query = tl.load(left + column, mask=(row < rows)[:, None] & (column < DIM), other=0.0)
        keys = tl.load(right + column, mask=(key < num_blocks)[:, None] & (column < DIM), other=0.0)
        total = tl.dot(query, tl.trans(keys), total, input_precision="ieee")
    inside = (row < rows)[:, None] & (key < num_blocks)[None, :]
    place = (head // heads * rows + row[:, None]) * num_blocks + key[None, :]
    seen = tl.load(tile_class + place, mask=inside, other=_EMPTY) != _EMPTY
    place = (head * rows + row[:, None]) * num_blocks + key[None, :]
    tl.store(scores + place, tl.where(seen, total * scale, float("-inf")), mask=inside)
