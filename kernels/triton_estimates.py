"""Estimates as Triton kernels: scores of probe rows live in registers and never reach memory.

The specification is estimates.py. One program scores one tile of keys against the probe rows of all query
heads of a key head. Each stage scores again, because reading keys is cheaper than storing scores. What the
programs add up are integers, and maxima, so the order in which they run does not matter; a score depends
on its own query and key alone, because every tile has one shape and no count makes a kernel compile anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .estimates import FIXED, LOG2E, Probes
from .select import ID_BITS
from .triton_forward import INTERPRET, launch, rows_of, square, visible
from .triton_select import threshold, tiles_of_diagonals, top_k

__all__ = ["masses", "peaks", "threshold", "tiles_of_diagonals", "top_k", "totals"]

COUNTS = ["heads", "kv_heads", "tokens", "windows", "stride", "num_blocks"]
_ONE = tl.constexpr(float(FIXED))
_ID_BITS = tl.constexpr(ID_BITS)


def peaks(rows: Tensor, k: Tensor, probes: Probes) -> Tensor:
    """fp32 [W, H, P]: as in estimates.py."""
    peak = torch.full(rows.shape[:3], -torch.inf, device=k.device)
    _run(_peaks, rows, k, probes, (peak,))
    return peak


def totals(rows: Tensor, k: Tensor, peak: Tensor, probes: Probes) -> Tensor:
    """int64 [W, H, P]: as in estimates.py."""
    total = torch.zeros(rows.shape[:3], dtype=torch.int64, device=k.device)
    _run(_totals, rows, k, probes, (peak, total))
    return total


def masses(
    rows: Tensor, k: Tensor, peak: Tensor, share: Tensor, tail: Tensor, probes: Probes
) -> tuple[Tensor, Tensor, Tensor]:
    """int64 [W, H, num_blocks], [W, H] and [H, T * block]: as in estimates.py."""
    windows, heads = rows.shape[:2]
    slash = torch.zeros(windows, heads, probes.num_blocks, dtype=torch.int64, device=k.device)
    far = torch.zeros(windows, heads, dtype=torch.int64, device=k.device)
    codes = torch.empty(heads, tail.numel(), dtype=torch.int64, device=k.device)
    state = (peak, share, tail, probes.rows, slash, far, codes, codes.shape[1], probes.num_blocks)
    registers = 128 if k.shape[3] <= 128 else 168  # with 128 of them, two programs fit into an SM
    _run(_masses, rows, k, probes, state, longest=64, maxnreg=registers)
    return slash, far, codes


def _run(
    kernel, rows: Tensor, k: Tensor, probes: Probes, state: tuple, longest: int = 128, **options
) -> None:
    """Launches a kernel with one program for every pair, key head and `longest` keys of a block."""
    heads, kv_heads, dim = rows.shape[1], k.shape[1], k.shape[3]
    exact = k.element_size() == 4
    keys = min(probes.block_size, 32 if exact and not INTERPRET else longest)
    launch(
        kernel,
        len(probes.pairs) * (probes.block_size // keys) * kv_heads,
        k,
        (rows.contiguous(), k.contiguous(), probes.pairs, probes.bounds, dim**-0.5 * LOG2E)
        + (heads, kv_heads, k.shape[2], len(rows), *state),
        BLOCK=probes.block_size,
        KEYS=keys,
        ROWS=rows.shape[2],
        DIM=dim,
        WIDTH=max(16, triton.next_power_of_2(dim)),
        PREFIX=len(probes.bounds) > 2,
        TYPE=tl.float32 if INTERPRET or exact else _TYPES[k.dtype],
        num_warps=8,
        num_stages=2,
        **options,
    )


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}  # the interpreter cannot multiply bf16


@triton.jit
def _tile(
    k, pairs, kv_heads, tokens, BLOCK: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """The tile of this program: window, key head, block, where its keys [KEYS] lie among those of all
    pairs, their logical positions, and the keys themselves [KEYS, WIDTH].
    """
    kv_head = tl.program_id(0) % kv_heads
    rest = tl.program_id(0) // kv_heads
    number, first = rest // (BLOCK // KEYS), rest % (BLOCK // KEYS) * KEYS
    pair = pairs + number * 4
    window, slot, block, batch = tl.load(pair), tl.load(pair + 1), tl.load(pair + 2), tl.load(pair + 3)
    token = (batch * kv_heads + kv_head) * tokens + slot * BLOCK + first
    keys = rows_of(k + token * DIM, square(KEYS, DIM, WIDTH), DIM, WIDTH, TYPE)
    inside = first + tl.arange(0, KEYS)
    place = number.to(tl.int64) * BLOCK + inside
    return window, kv_head, block.to(tl.int32), place, (block * BLOCK).to(tl.int32) + inside, keys


@triton.jit
def _seen(bounds, window, windows, position, ROWS: tl.constexpr, PREFIX: tl.constexpr):
    """Whether the queries of a window see key positions [1, KEYS] or [KEYS, 1]; same form with ROWS."""
    low = bounds + window * ROWS + tl.arange(0, ROWS)
    part = windows.to(tl.int64) * ROWS
    prefix = low + 2 * part if PREFIX else low
    return visible(
        position, tl.load(low), tl.load(low + part), tl.load(prefix), tl.load(prefix + part), PREFIX
    )


@triton.jit
def _queries(rows, probe, keys, ROWS: tl.constexpr, DIM: tl.constexpr):
    """[ROWS, WIDTH] queries of probe = window * heads + head, in the dtype of the keys."""
    WIDTH: tl.constexpr = keys.shape[1]
    return rows_of(rows + probe * (ROWS * DIM), square(ROWS, DIM, WIDTH), DIM, WIDTH, keys.dtype)


@triton.jit
def _products(left, right, seen):
    """fp32 products of queries and keys, in either order, -inf where invisible."""
    return tl.where(seen, tl.dot(left, tl.trans(right), input_precision="ieee"), float("-inf"))


@triton.jit
def _shift(peak, at):
    """What to subtract from scores: the peak [ROWS], 0 for queries that see no key anywhere."""
    high = tl.load(peak + at)
    return tl.where(high == float("-inf"), 0.0, high)


@triton.jit
def _fixed(x):
    """int32: values in [0, 1] in fixed point, to the nearest."""
    return (x * _ONE + 0.5).to(tl.int32)


@triton.jit(do_not_specialize=COUNTS)
def _peaks(
    rows, k, pairs, bounds, scale, heads, kv_heads, tokens, windows, peak,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PREFIX: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    window, kv_head, _, _, position, keys = _tile(k, pairs, kv_heads, tokens, BLOCK, KEYS, DIM, WIDTH, TYPE)
    seen = _seen(bounds, window, windows, position[None, :], ROWS, PREFIX)
    members = heads // kv_heads
    for member in range(0, members):
        probe = window * heads + kv_head * members + member
        products = _products(_queries(rows, probe, keys, ROWS, DIM), keys, seen)
        high = tl.max(products, 1) * scale
        tl.atomic_max(peak + probe * ROWS + tl.arange(0, ROWS), high, sem="relaxed")


@triton.jit(do_not_specialize=COUNTS)
def _totals(
    rows, k, pairs, bounds, scale, heads, kv_heads, tokens, windows, peak, total,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PREFIX: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    window, kv_head, _, _, position, keys = _tile(k, pairs, kv_heads, tokens, BLOCK, KEYS, DIM, WIDTH, TYPE)
    seen = _seen(bounds, window, windows, position[None, :], ROWS, PREFIX)
    members = heads // kv_heads
    for member in range(0, members):
        probe = window * heads + kv_head * members + member
        products = _products(_queries(rows, probe, keys, ROWS, DIM), keys, seen)
        at = probe * ROWS + tl.arange(0, ROWS)
        weights = _fixed(tl.exp2(products * scale - _shift(peak, at)[:, None]))
        tl.atomic_add(total + at, tl.sum(weights.to(tl.int64), 1), sem="relaxed")


@triton.jit(do_not_specialize=COUNTS)
def _masses(
    rows, k, pairs, bounds, scale, heads, kv_heads, tokens, windows,
    peak, share, tail, firsts, slash, far, codes, stride, num_blocks,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PREFIX: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    window, kv_head, block, place, position, keys = _tile(
        k, pairs, kv_heads, tokens, BLOCK, KEYS, DIM, WIDTH, TYPE
    )
    tails = tl.load(tail + place)
    LAST: tl.constexpr = (BLOCK + ROWS - 2) // BLOCK  # no offset reaches beyond LAST + 1 blocks
    members = heads // kv_heads
    for member in range(0, members):
        # What every member shares is computed again: kept in registers, it would leave none.
        seen = _seen(bounds, window, windows, position[:, None], ROWS, PREFIX)
        # Distance of the first query from the first key of the block: `diagonal` blocks and `rest` tokens.
        # It is negative where the block begins among the probe; adding whole blocks rounds that down, too.
        base = tl.load(firsts + window * ROWS).to(tl.int32) - block * BLOCK
        diagonal = (base + ROWS * BLOCK) // BLOCK - ROWS
        rest = base - diagonal * BLOCK
        offset = (rest + tl.arange(0, ROWS))[None, :] - (position - block * BLOCK)[:, None]
        head = kv_head * members + member
        probe = window * heads + head
        at = probe * ROWS + tl.arange(0, ROWS)
        products = _products(keys, _queries(rows, probe, keys, ROWS, DIM), seen)
        weights = tl.exp2(products * scale - _shift(peak, at)[None, :])
        mass = _fixed(weights * tl.load(share + at)[None, :])
        vertical = tl.sum(mass.to(tl.int64), 1)
        able = tails >= 0
        code = tl.where(able, (vertical << _ID_BITS) + tails, -1)
        tl.store(codes + head.to(tl.int64) * stride + place, code)
        tl.atomic_add(far + probe, tl.sum(tl.where(able, vertical, 0)), sem="relaxed")
        # A triangle of weights is the second difference of ramps max(offset - i * BLOCK, 0), i = -2, -1, ...
        here = tl.sum(mass.to(tl.int64) * (offset + BLOCK))
        before = here + tl.sum(vertical) * BLOCK
        for i in tl.static_range(LAST + 3):
            after = here * 0
            if i <= LAST:
                if rest + ROWS - 1 > i * BLOCK:
                    after = tl.sum(mass.to(tl.int64) * tl.maximum(offset - i * BLOCK, 0))
            bin = tl.minimum(tl.maximum(diagonal + i - 1, 0), num_blocks - 1)
            tl.atomic_add(slash + probe * num_blocks + bin, before - 2 * here + after, sem="relaxed")
            before, here = here, after
