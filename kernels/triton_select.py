"""Selection by bisection on the bits of codes, in Triton: no sort, one launch a round; and chosen tiles.

The specification is select.py, that of tiles in estimates.py. Entries are kept from some code on; the
highest such code that still keeps enough is found bit by bit, counting or adding up what each candidate
would keep. All sums are integers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import EMPTY, Geometry
from .plan import WORD
from .select import FORCED, ID_BITS, Contest
from .triton_forward import launch

COUNTS = ["length", "heads", "stride", "size", "floor", "cap", "keep"]
COUNTS += ["rows", "num_blocks", "windows", "depth", "words", "local"]
_WORD = tl.constexpr(WORD)
_EMPTY = tl.constexpr(EMPTY)
_ID_BITS = tl.constexpr(ID_BITS)
_FORCED_BIT = tl.constexpr(FORCED.bit_length() - 1)
_MASS = tl.constexpr(FORCED - 1)  # the bits of the mass, and of the id below it


def threshold(codes: Tensor, target: Tensor, floor: int, cap: int) -> Tensor:
    """int64 [...]: as in select.py."""
    codes, target = codes.contiguous(), target.contiguous()
    lowest = torch.empty_like(target)
    arguments = (codes, target, lowest, codes.shape[-1], floor, cap)
    launch(_threshold, target.numel(), codes, arguments, STEP=1024, num_warps=8)
    return lowest


def top_k(codes: Tensor, contest: Contest) -> Tensor:
    """int64 [H, parts, keep]: as in select.py; the order is that of the list."""
    heads = len(codes)
    for matches, size in zip(contest.rounds, contest.sizes, strict=True):
        winners = codes.new_full((heads, size), -1)
        arguments = (codes, matches, winners, heads, codes.shape[1], size, contest.keep)
        launch(_match, len(matches) * heads, codes, arguments, STEP=2048, num_warps=8)
        codes = winners
    return codes.view(heads, len(contest.bounds), contest.keep)


def tiles_of_diagonals(chosen: Tensor, geometry: Geometry, local: int, window_of_row: Tensor) -> Tensor:
    """int32 [B, H, held blocks, words]: as in estimates.py."""
    windows, heads = chosen.shape[:2]
    rows, words = len(geometry.blocks), -(-geometry.num_blocks // WORD)
    tiles = torch.empty(geometry.batch, heads, rows, words, dtype=torch.int32, device=chosen.device)
    state = (chosen.view(torch.uint8), window_of_row, geometry.block_ids, geometry.tile_class, tiles)
    counts = (heads, rows, geometry.num_blocks, windows, window_of_row.shape[2], words, local)
    launch(_tiles, geometry.batch * heads * rows, chosen, (*state, *counts), num_warps=4)
    return tiles


@triton.jit
def _kept(codes, length, lowest, STEP: tl.constexpr):
    """How many of `length` codes are at least `lowest`, and their mass."""
    count = tl.zeros([STEP], tl.int32)
    mass = tl.zeros([STEP], tl.int64)
    for start in range(0, length, STEP):
        place = start + tl.arange(0, STEP)
        code = tl.load(codes + place, mask=place < length, other=-1)
        taken = code >= lowest
        count += taken.to(tl.int32)
        mass += tl.where(taken, (code & _MASS) >> _ID_BITS, 0)
    return tl.sum(count), tl.sum(mass)


@triton.jit(do_not_specialize=COUNTS)
def _threshold(codes, target, lowest, length, floor, cap, STEP: tl.constexpr):
    """One program for one list of codes."""
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(target + row)
    codes += row * length
    forced = tl.full([], 1, tl.int64) << _FORCED_BIT
    found = forced * 0
    for i in range(0, _FORCED_BIT + 1):
        candidate = found | (forced >> i)
        count, mass = _kept(codes, length, candidate, STEP)
        enough = (mass >= wanted) & (count >= floor) & (candidate <= forced)
        found = tl.where(enough | (count >= cap), candidate, found)
    tl.store(lowest + row, found)


@triton.jit(do_not_specialize=COUNTS)
def _match(codes, matches, winners, heads, stride, size, keep, STEP: tl.constexpr):
    """One program for one match of one head: writes its `keep` highest codes, or all that are valid."""
    head = tl.program_id(0).to(tl.int64) % heads
    match = matches + tl.program_id(0) // heads * 3
    begin, length, place = tl.load(match), tl.load(match + 1), tl.load(match + 2)
    codes += head * stride + begin
    winners += head * size + place
    forced = tl.full([], 1, tl.int64) << _FORCED_BIT
    found, left, count = forced * 0, forced, length.to(tl.int32)
    while (left > 0) & (count > keep):  # codes differ, so that some threshold keeps exactly `keep`
        kept, _ = _kept(codes, length, found | left, STEP)
        if kept >= keep:
            found, count = found | left, kept
        left = left >> 1
    written = 0
    for start in range(0, length, STEP):
        entry = start + tl.arange(0, STEP)
        code = tl.load(codes + entry, mask=entry < length, other=-1)
        taken = (code >= found).to(tl.int32)
        tl.store(winners + written + tl.cumsum(taken, 0) - taken, code, mask=taken > 0)
        written += tl.sum(taken)


@triton.jit(do_not_specialize=COUNTS)
def _tiles(
    chosen, window_of_row, block_ids, tile_class, tiles, heads, rows, num_blocks, windows, depth, words, local
):  # fmt: skip
    """One program makes the words of one row of one head."""
    WORDS: tl.constexpr = 32
    pid = tl.program_id(0).to(tl.int64)
    row, head, batch = pid % rows, pid // rows % heads, pid // rows // heads
    block = tl.load(block_ids + row).to(tl.int32)
    bit = tl.arange(0, _WORD)[None, :]
    for start in range(0, words, WORDS):
        word = start + tl.arange(0, WORDS)
        key = word[:, None] * _WORD + bit
        distance = block - key
        able = (key < num_blocks) & (distance >= 0)
        kind = tl.load(tile_class + (batch * rows + row) * num_blocks + key, mask=able, other=_EMPTY)
        able &= kind != _EMPTY
        taken = distance < local
        for i in range(0, depth):
            window = tl.load(window_of_row + (batch * rows + row) * depth + i)
            diagonals = chosen + (window * heads + head) * num_blocks
            taken |= tl.load(diagonals + distance, mask=able & (window < windows), other=0) != 0
        bits = tl.where(taken & able, 1 << bit, 0)
        tl.store(tiles + pid * words + word, tl.sum(bits, 1), mask=word < words)
