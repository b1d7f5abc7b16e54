"""Antidiagonal block scores as Triton kernels: scores of groups live in registers and never reach memory.

The specification is antidiagonal.py. One program scores a fixed number of query groups, of several blocks,
against as many key groups, or ends at once if none is visible; each stage scores again. What programs add
up are integers, and maxima, so the order in which they run does not matter; a score depends on its own
groups alone, because every tile has one shape and no count makes a kernel compile anew.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .antidiagonal import check, group_bounds, held_groups, share_of
from .estimates import FIXED, LOG2E
from .geometry import Geometry
from .triton_forward import INTERPRET, launch, visible

__all__ = ["masses", "peaks", "totals"]

COUNTS = ["heads", "kv_heads", "rows", "keys", "batches", "row_tiles", "key_tiles"]
_ONE = tl.constexpr(float(FIXED))
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def peaks(q: Tensor, k: Tensor, blocks: Tensor, geometry: Geometry, stride: int) -> Tensor:
    """fp32 [B, H, held groups]: as in antidiagonal.py."""
    check(q, k, blocks, geometry, stride)
    peak = torch.full(held_groups(q, stride), -torch.inf, device=q.device)
    _run("peaks", q, k, blocks, geometry, stride, peak, peak, peak)
    return peak


def totals(q: Tensor, k: Tensor, blocks: Tensor, peak: Tensor, geometry: Geometry, stride: int) -> Tensor:
    """int64 [B, H, held groups]: as in antidiagonal.py."""
    check(q, k, blocks, geometry, stride)
    total = torch.zeros(held_groups(q, stride), dtype=torch.int64, device=q.device)
    _run("totals", q, k, blocks, geometry, stride, peak, peak, total)
    return total


def masses(
    q: Tensor, k: Tensor, blocks: Tensor, peak: Tensor, total: Tensor, geometry: Geometry, stride: int
) -> Tensor:
    """int32 [B, H, held blocks, T]: as in antidiagonal.py."""
    check(q, k, blocks, geometry, stride)
    shape = (*q.shape[:2], len(geometry.blocks), len(blocks))
    mass = torch.zeros(shape, dtype=torch.int32, device=q.device)
    _run("masses", q, k, blocks, geometry, stride, peak, share_of(total, peak), mass)
    return mass


def _run(
    stage: Literal["peaks", "totals", "masses"],
    q: Tensor,
    k: Tensor,
    blocks: Tensor,
    geometry: Geometry,
    stride: int,
    peak: Tensor,
    share: Tensor,
    result: Tensor,
) -> None:
    """Launches a stage with one program for every query head, TILE held groups and TILE key groups.

    peak and share are read by the stages after those that find them.
    """
    batch, heads, _, dim = q.shape
    groups, kv_heads = geometry.block_size // stride, k.shape[1]
    rows, keys = q.shape[2] // stride, k.shape[2] // stride
    exact = q.element_size() == 4
    tile = max(groups, 16 if INTERPRET else 64 if exact else 128)
    tiles = -(-rows // tile), -(-keys // tile)
    bounds = group_bounds(geometry, stride)
    scale = dim**-0.5 / stride * LOG2E
    launch(
        _score,
        batch * heads * tiles[0] * tiles[1],
        q,
        (q.contiguous(), k.contiguous(), blocks, bounds, scale, heads, kv_heads, rows, keys, batch)
        + (*tiles, peak.contiguous(), share.contiguous(), result),
        STAGE=stage,
        STRIDE=stride,
        GROUPS=groups,
        DIM=dim,
        TILE=tile,
        WIDTH=min(triton.next_power_of_2(max(16, dim)), 32 if exact else 64),
        PREFIX=len(bounds) > 2,
        TYPE=tl.float32 if INTERPRET else _TYPES[q.dtype],  # the interpreter cannot multiply bf16
        num_warps=8,
        num_stages=3,
        maxnreg=255 if exact else 128,  # with 128 registers, two programs fit into an SM
    )


@triton.jit
def _place(heads, kv_heads, row_tiles, key_tiles, TILE: tl.constexpr):
    """Query head and key head of this program, both over the batch, its batch row, first row and first key.

    Programs that share keys run side by side; last rows, which see most, come first.
    """
    members = heads // kv_heads
    member = tl.program_id(0) % members
    rest = tl.program_id(0) // members
    key = rest % key_tiles
    rest = rest // key_tiles
    row = row_tiles - 1 - rest % row_tiles
    kv_head = rest // row_tiles
    head = (kv_head * members + member).to(tl.int64)
    return head, kv_head.to(tl.int64), kv_head // kv_heads, row * TILE, key * TILE


@triton.jit
def _intervals(bounds, batch, batches, first, rows, TILE: tl.constexpr, PREFIX: tl.constexpr):
    """low, high and prefix_low, prefix_high [TILE] of query groups; nothing is visible beyond the rows."""
    at = first + tl.arange(0, TILE)
    inside = at < rows
    low = bounds + batch.to(tl.int64) * rows + at
    part = batches.to(tl.int64) * rows
    prefix = low + 2 * part if PREFIX else low
    return (
        tl.load(low, mask=inside, other=2**30),
        tl.load(low + part, mask=inside, other=-(2**30)),
        tl.load(prefix, mask=inside, other=2**30),
        tl.load(prefix + part, mask=inside, other=-(2**30)),
    )


@triton.jit
def _positions(blocks, first, keys, STRIDE: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr):
    """int32 [TILE]: logical token at which each key group begins; beyond the keys, one that nobody sees."""
    at = first + tl.arange(0, TILE)
    block = tl.load(blocks + at // GROUPS, mask=at < keys, other=-1).to(tl.int32)
    return block * (GROUPS * STRIDE) + at % GROUPS * STRIDE


@triton.jit
def _products(
    q, k, head, kv_head, row, key, rows, keys, STRIDE: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """fp32 [TILE, TILE] antidiagonal sums of query groups from `row` and key groups from `key` on."""
    # Beyond the last group it is read again, which saves masks.
    inside = tl.arange(0, WIDTH)[None, :]
    of_query = tl.minimum(tl.arange(0, TILE), rows - 1 - row)[:, None] * (STRIDE * DIM) + inside
    of_key = tl.minimum(tl.arange(0, TILE), keys - 1 - key)[:, None] * (STRIDE * DIM) + inside
    left = q + (head * rows + row) * (STRIDE * DIM) + (STRIDE - 1) * DIM
    right = k + (kv_head * keys + key) * (STRIDE * DIM)
    PARTS: tl.constexpr = (DIM + WIDTH - 1) // WIDTH
    total = tl.zeros([TILE, TILE], tl.float32)
    for step in range(0, STRIDE * PARTS):
        column = step % PARTS * WIDTH
        token = step // PARTS * DIM
        if DIM % WIDTH == 0:
            query = tl.load(left - token + column + of_query)
            keys_of = tl.load(right + token + column + of_key)
        else:
            some = inside < DIM - column
            query = tl.load(left - token + column + of_query, mask=some, other=0.0)
            keys_of = tl.load(right + token + column + of_key, mask=some, other=0.0)
        total = tl.dot(query.to(TYPE), tl.trans(keys_of.to(TYPE)), total, input_precision="ieee")
    return total


@triton.jit
def _fixed(x):
    """int32: values in [0, 1] in fixed point, to the nearest."""
    return (x * _ONE + 0.5).to(tl.int32)


@triton.jit
def _sum_of_tiles(x, GROUPS: tl.constexpr):
    """int64 [TILE, TILE] / GROUPS: sums of int32 over tiles of GROUPS x GROUPS; those of rows fit 32 bits."""
    TILE: tl.constexpr = x.shape[0]
    COUNT: tl.constexpr = TILE // GROUPS
    of_rows = tl.sum(tl.reshape(x, [TILE, COUNT, GROUPS]), 2)
    return tl.sum(tl.reshape(of_rows.to(tl.int64), [COUNT, GROUPS, COUNT]), 1)


@triton.jit(do_not_specialize=COUNTS)
def _score(
    q, k, blocks, bounds, scale, heads, kv_heads, rows, keys, batches, row_tiles, key_tiles,
    peak, share, result, STAGE: tl.constexpr, STRIDE: tl.constexpr, GROUPS: tl.constexpr,
    DIM: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, PREFIX: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    head, kv_head, batch, row, key = _place(heads, kv_heads, row_tiles, key_tiles, TILE)
    position = _positions(blocks, key, keys, STRIDE, GROUPS, TILE)
    low, high, prefix_low, prefix_high = _intervals(bounds, batch, batches, row, rows, TILE, PREFIX)
    near = (position >= tl.min(low, 0)) & (position <= tl.max(high, 0))
    if PREFIX:
        near = near | ((position >= tl.min(prefix_low, 0)) & (position <= tl.max(prefix_high, 0)))
    if tl.max(near.to(tl.int32), 0) > 0:
        scores = _products(q, k, head, kv_head, row, key, rows, keys, STRIDE, DIM, TILE, WIDTH, TYPE) * scale
        seen = visible(position[None, :], low, high, prefix_low, prefix_high, PREFIX)
        scores = tl.where(seen, scores, float("-inf"))
        inside = row + tl.arange(0, TILE) < rows
        at = head * rows + row + tl.arange(0, TILE)
        if STAGE == "peaks":
            tl.atomic_max(result + at, tl.max(scores, 1), mask=inside, sem="relaxed")
        else:
            shift = tl.load(peak + at, mask=inside, other=0.0)
            shift = tl.where(shift == float("-inf"), 0.0, shift)  # of groups that see no key anywhere
            weights = tl.exp2(scores - shift[:, None])
            if STAGE == "totals":
                total = tl.sum(_fixed(weights).to(tl.int64), 1)
                tl.atomic_add(result + at, total, mask=inside, sem="relaxed")
            else:
                weights = weights * tl.load(share + at, mask=inside, other=0.0)[:, None]
                mean = (_sum_of_tiles(_fixed(weights), GROUPS) + GROUPS // 2) // GROUPS
                block = row // GROUPS + tl.arange(0, TILE // GROUPS)[:, None]
                slot = key // GROUPS + tl.arange(0, TILE // GROUPS)[None, :]
                held, slots = rows // GROUPS, keys // GROUPS
                places = result + (head * held + block) * slots + slot
                tl.store(places, mean.to(tl.int32), mask=(block < held) & (slot < slots))
