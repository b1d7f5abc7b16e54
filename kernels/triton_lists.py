"""The lists of a bound plan, made from its bitmask by Triton kernels; bound.py says what they hold.

Three steps, and memory for little more than bitmask and lists:
1. bits are put into the physical order of the sources, by row and by key: a bit matrix is transposed, and
   for sources that are not simply the sequence transposed back;
2. the bits of every line are counted, and the counts summed up to pointers;
3. every byte of a line writes its entries, at places that prefix sums of bits inside the line give.
No atomics, no sorting and no host synchronisation: the same lists on every run.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import AHEAD, Lists
from .geometry import FULL, Geometry
from .plan import WORD, Plan, pack_bits
from .triton_forward import INTERPRET, launch

LINES = 256 if INTERPRET else 8  # of a program; the interpreter is slow by the program
COUNTS = ["lines", "words_of_line", "length", "runs", "taken", "heads", "total", "bits"]


class Tables(NamedTuple):
    """What the lists need of a batch, the same for all layers.

    slots: int32 [R * n], the logical block in each slot, -1 for none; sources: R.
    rows: int32 [M], 0 to M - 1.
    in_order: whether there is one source that holds the sequence as it is.
    full: the bits of the full tiles as `physical` gives them, of one head.
    """

    slots: Tensor
    sources: int
    rows: Tensor
    in_order: bool
    full: tuple[Tensor, Tensor] = ()


def tables(geometry: Geometry, slots: Tensor, in_order: bool = False) -> Tables:
    """The tables of a batch for sources that hold int64 slots [R, n], on the device, as bound.py has them."""
    rows = geometry.memo(
        "rows", lambda: torch.arange(len(geometry.blocks), dtype=torch.int32, device=geometry.device)
    )
    known = Tables(slots.int().flatten(), len(slots), rows, in_order)
    words = geometry.memo("full tiles", lambda: pack_bits(geometry.tile_class == FULL)[:, None])
    return known._replace(full=physical(words, known))


def lists(plan: Plan, known: Tables, capacity: int) -> tuple[Lists, Lists]:
    """The lists by row and by key, with room for `capacity` entries each.

    Entries behind the last one are not initialised, apart from the AHEAD that a kernel may read.
    """
    by_row, by_key = physical(plan.tiles, known)
    slots = len(known.slots) // known.sources
    return (
        csr(by_row, known.full[0], slots, capacity),
        csr(by_key, known.full[1], len(known.rows), capacity),
    )


def physical(words: Tensor, known: Tables) -> tuple[Tensor, Tensor]:
    """Bits in physical order of int32 words [B, H, M, ceil(num_blocks / 32)] in logical order.

    By row [B, H, M, R, ceil(n / 32)], bits are slots; by key [B, H, R * n, ceil(M / 32)], bits are rows.
    """
    by_key = _transposed(words.contiguous(), known.slots, 1)
    if known.in_order:
        return words.contiguous()[:, :, :, None], by_key
    return _transposed(by_key, known.rows, known.sources).unflatten(3, (known.sources, -1)), by_key


def _transposed(words: Tensor, take: Tensor, runs: int) -> Tensor:
    """[B, H, len(take), words]: for every bit that `take` names, that bit of all lines of words [B, H, L, W].

    Each of the `runs` equal parts of the lines fills words of its own. A bit -1 is 0 in all lines.
    """
    batch, heads, lines, width = words.shape
    length = lines // runs
    out = words.new_empty(batch, heads, len(take), runs * triton.cdiv(length, WORD))
    WORDS, BITS = 8, 4 * LINES
    programs = batch * heads * triton.cdiv(out.shape[3], WORDS) * triton.cdiv(len(take), BITS)
    arguments = (words, take, out, lines, width, length, runs, len(take))
    launch(_transpose, programs, words, arguments, WORDS=WORDS, BITS=BITS, num_warps=1)
    return out


def csr(words: Tensor, full: Tensor, bits: int, capacity: int) -> Lists:
    """CSR over the first `bits` bits of lines of words [B, H, ..., W]; full: words [B, 1, ..., W].

    Pointers int32 [lines + 1], numbers of full entries int32 [lines], entries int32 [capacity + AHEAD].
    """
    total, lines = prod(words.shape[:-1]), max(1, prod(words.shape[2:-1]))
    pointer = torch.empty(total + 1, dtype=torch.int32, device=words.device)
    num_full = torch.empty(total, dtype=torch.int32, device=words.device)
    entries = torch.empty(capacity + AHEAD, dtype=torch.int32, device=words.device)
    given = (words, full, pointer, num_full)
    sizes = (words.shape[1], lines, total, words.shape[-1], bits)
    programs = triton.cdiv(total + 1, LINES)  # one behind the last, also where there are none
    launch(_count, programs, words, (*given, *sizes), LINES=LINES, WORDS=32, num_warps=1)
    torch.cumsum(pointer, 0, dtype=torch.int32, out=pointer)
    launch(_fill, programs, words, (*given, entries, *sizes), LINES=LINES, BYTES=32, AHEAD=AHEAD, num_warps=1)
    return pointer, num_full, entries


@triton.jit(do_not_specialize=COUNTS)
def _transpose(
    words, take, out, lines, words_of_line, length, runs, taken, WORDS: tl.constexpr, BITS: tl.constexpr
):
    """One program: WORDS words of BITS lines of the result; neighbouring threads read the same words."""
    words_of_run = tl.cdiv(length, 32)
    width = runs * words_of_run
    across, down = tl.cdiv(taken, BITS), tl.cdiv(width, WORDS)
    pid = tl.program_id(0)
    matrix = (pid // across // down).to(tl.int64)
    at = (pid % across * BITS + tl.arange(0, BITS))[:, None]
    bit = tl.load(take + at, mask=at < taken, other=-1)
    word = (pid // across % down * WORDS + tl.arange(0, WORDS))[None, :]
    # No mask in the loop: what is not there is read elsewhere and left out at the end. The last word of a
    # run takes the last 32 lines and shifts out those that the word before it has.
    run, first = tl.minimum(word, width - 1) // words_of_run, tl.minimum(word, width - 1) % words_of_run * 32
    start = tl.maximum(tl.minimum(first, length - 32), 0)
    known = tl.maximum(bit, 0)
    given = words + (matrix * lines + run * length + start) * words_of_line + known // 32
    result = tl.zeros([BITS, WORDS], tl.uint32)
    for part in range(0, 32, 8):
        for i in tl.static_range(8):
            line = tl.minimum(31 - part - i, length - 1)
            value = tl.load(given + line * words_of_line).to(tl.uint32, bitcast=True)
            result = (result << 1) | (value << (31 - known % 32) >> 31)
    short = tl.maximum(32 - length, 0)
    result = result << short >> short >> (first - start)
    result = tl.where(bit >= 0, result, 0).to(tl.int32, bitcast=True)
    place = (matrix * taken + at) * width + word
    tl.store(out + place, result, mask=(at < taken) & (word < width))


@triton.jit
def _line(words, full, x, heads, lines, total, words_of_line):
    """Where the words of lines x, and of their full tiles, begin, and which lines there are."""
    known = x < total
    batch = x // (heads * lines)
    line = batch * lines + x % lines
    return words + x.to(tl.int64) * words_of_line, full + line.to(tl.int64) * words_of_line, known


@triton.jit
def _ones_of_bytes(x):
    """How many bits are set in each byte of 32-bit words."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (x + (x >> 4)) & 0x0F0F0F0F


@triton.jit
def _ones(x):
    """How many bits of 32-bit words are set."""
    x = _ones_of_bytes(x)
    x += x >> 16
    return ((x + (x >> 8)) & 63).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=COUNTS)
def _count(
    words,
    full,
    pointer,
    num_full,
    heads,
    lines,
    total,
    words_of_line,
    bits,
    LINES: tl.constexpr,
    WORDS: tl.constexpr,
):
    """pointer[x + 1] is the number of entries of line x, pointer[0] is 0; num_full is complete."""
    x = tl.program_id(0) * LINES + tl.arange(0, LINES)
    words, full, known = _line(words, full, x, heads, lines, total, words_of_line)
    chosen_count, full_count = tl.zeros([LINES], tl.int32), tl.zeros([LINES], tl.int32)
    for start in range(0, words_of_line, WORDS):
        word = start + tl.arange(0, WORDS)[:, None]
        mask = known[None, :] & (word < words_of_line)
        # Bits behind the last one are of no block, whatever they hold: they are pushed out.
        excess = tl.minimum(tl.maximum((word + 1) * 32 - bits, 0), 31)
        chosen = tl.load(words[None, :] + word, mask=mask, other=0) << excess
        covered = tl.load(full[None, :] + word, mask=mask, other=0) << excess
        chosen_count += tl.sum(_ones(chosen), 0)
        full_count += tl.sum(_ones(chosen & covered), 0)
    tl.store(pointer + 1 + x, chosen_count, mask=known)
    tl.store(num_full + x, full_count, mask=known)
    tl.store(pointer + x, 0, mask=x == 0)


@triton.jit
def _write(place, bits, first):
    """Stores first + i for every set bit i of bytes, one behind the other from `place` on."""
    for i in tl.static_range(8):
        chosen = bits & (1 << i) != 0
        tl.store(place, first + i, mask=chosen)
        place += chosen.to(tl.int32)


@triton.jit(do_not_specialize=COUNTS)
def _fill(
    words,
    full,
    pointer,
    num_full,
    entries,
    heads,
    lines,
    total,
    words_of_line,
    bits,
    LINES: tl.constexpr,
    BYTES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Threads side by side take the bytes of a line, so that they write side by side: bytes are axis 0."""
    x = tl.program_id(0) * LINES + tl.arange(0, LINES)
    words, full, known = _line(words, full, x, heads, lines, total, words_of_line)
    next_full = tl.load(pointer + x, mask=known, other=0)
    next_partial = next_full + tl.load(num_full + x, mask=known, other=0)
    for start in range(0, words_of_line * 4, BYTES):
        byte = start + tl.arange(0, BYTES)[:, None]
        mask = known[None, :] & (byte < words_of_line * 4)
        chosen = tl.load(words[None, :] + byte // 4, mask=mask, other=0) >> (byte % 4 * 8)
        chosen &= 0xFF >> tl.minimum(tl.maximum((byte + 1) * 8 - bits, 0), 8)
        if tl.max(chosen) > 0:
            covered = tl.load(full[None, :] + byte // 4, mask=mask, other=0) >> (byte % 4 * 8)
            whole, part = chosen & covered, chosen & ~covered
            # Both counts in one sum: of full entries in the lower half, of partial ones in the upper.
            count = _ones_of_bytes(whole | part << 16).to(tl.int32, bitcast=True)
            before = tl.cumsum(count, 0) - count
            _write(entries + next_full[None, :] + (before & 0xFFFF), whole, byte * 8)
            if tl.max(part) > 0:
                _write(entries + next_partial[None, :] + (before >> 16), part, byte * 8)
            both = tl.sum(count, 0)
            next_full += both & 0xFFFF
            next_partial += both >> 16
    # Behind the last entry, where the line after the last would begin: a slot that is always there.
    last = tl.load(pointer + x, mask=x == total, other=0)
    for i in tl.static_range(AHEAD):
        tl.store(entries + last + i, 0, mask=x == total)
