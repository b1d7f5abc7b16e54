"""Portable Triton backward without atomics, hence deterministic.

dQ is computed by rows like the forward; dK and dV by the transposed lists, one program for a part of a key
block that walks the query tiles of all query heads of its key head. Scores are recomputed from the final
lse, so nothing is carried between ring steps but the sums themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bound import BoundPlan
from .triton_forward import (
    COUNTS,
    LOG2E,
    check,
    intervals,
    launch,
    options,
    query_intervals,
    query_program,
    rows_of,
    square,
    visible,
)


def backward_step(q, k, v, dout, lse, delta, bound: BoundPlan, source: int, dq, dk, dv, scale: float) -> None:
    """Adds the gradients of the tiles of one source; lse is the final one, delta = sum(out * dout) - dlse."""
    check(scale, (q, k, v), (dq, dk, dv))
    batch, heads, _, _ = q.shape
    kv_heads, slots = k.shape[1], bound.blocks_per_source
    q, k, v, dout, lse, delta = (x.contiguous() for x in (q, k, v, dout, lse, delta))
    tensors = (q, k, v, dout, lse, delta)
    place = (scale * LOG2E.value, scale, source, bound.num_sources, bound.rows, slots, k.shape[2])
    place += (heads, kv_heads, bound.mask_heads)
    chosen, meta = options("dq", q, bound)
    lists = (bound.row_ptr, bound.row_full, bound.row_tiles, bound.key_base, *intervals(bound))
    launch(
        _dq,
        batch * heads * bound.rows * (bound.block_size // chosen.queries),
        q,
        (*tensors, dq, *lists, *place),
        **meta,
    )
    chosen, meta = options("dkv", q, bound)
    lists = (bound.key_ptr, bound.key_full, bound.key_tiles, bound.key_base, *intervals(bound))
    per_key_head = max(1, bound.mask_heads // kv_heads)
    launch(
        _dkv,
        batch * kv_heads * slots * (bound.block_size // chosen.keys),
        q,
        (*tensors, dk, dv, *lists, *place),
        LISTS=per_key_head,
        SHARE=heads // kv_heads // per_key_head,
        **meta,
    )


@triton.jit
def scores_by_query(
    q, k, v, dout, lse, delta, seen, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr
):
    """dscores [queries, keys] of one tile."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp2(scores * scale - lse[:, None])
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    return (weights * (dweights - delta[:, None])).to(k.dtype)


@triton.jit
def add_by_key(q, k, v, dout, lse, delta, seen, scale, dk, dv, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """dk, dv with one tile added. Scores are [keys, queries]: the orientation that Hopper can pipeline."""
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=dk.dtype)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp2(scores * scale - lse[None, :])
    dv = tl.dot(weights.to(q.dtype), dout, dv, input_precision=PRECISION, out_dtype=dv.dtype)
    dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION, out_dtype=dk.dtype)
    dscores = (weights * (dweights - delta[None, :])).to(q.dtype)
    dk = tl.dot(dscores, q, dk, input_precision=PRECISION, out_dtype=dk.dtype)
    return dk, dv


@triton.jit
def normaliser(lse, delta, COUNT: tl.constexpr):
    """The final lse in base 2, finite where the query saw nothing, and delta."""
    value = tl.load(lse + tl.arange(0, COUNT))
    value = tl.where(value == float("-inf"), 0.0, value * LOG2E)
    return value, tl.load(delta + tl.arange(0, COUNT))


@triton.jit
def add_to(target, places, last, x, COUNT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Adds x to `last` consecutive rows from `target` on, places = square(...)."""
    kept = (tl.arange(0, COUNT) < last)[:, None] & (tl.arange(0, WIDTH) < DIM)[None, :]
    tl.store(target + places, tl.load(target + places, mask=kept, other=0.0) + x, mask=kept)


@triton.jit(do_not_specialize=COUNTS)
def _dq(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dq,
    row_ptr,
    row_full,
    row_tiles,
    key_base,
    lo,
    hi,
    prefix_lo,
    prefix_hi,
    scale_log2,
    scale,
    source,
    num_sources,
    rows,
    slots,
    key_tokens,
    heads,
    kv_heads,
    mask_heads,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch, head, row, token = query_program(rows, heads, kv_heads, BLOCK, QUERIES)
    x = ((batch * mask_heads + head * mask_heads // heads) * rows + row) * num_sources + source
    begin, end = tl.load(row_ptr + x), tl.load(row_ptr + x + 1)
    if begin == end:
        return
    full = tl.load(row_full + x)
    ACC: tl.constexpr = dq.dtype.element_ty
    offset = (batch * heads + head).to(tl.int64) * rows * BLOCK + token
    key_offset = (batch * kv_heads + head * kv_heads // heads).to(tl.int64) * key_tokens * DIM
    k, v = k + key_offset, v + key_offset
    query_square, key_square = square(QUERIES, DIM, WIDTH), square(KEYS, DIM, WIDTH)
    queries = rows_of(q + offset * DIM, query_square, DIM, WIDTH, TYPE)
    grads = rows_of(dout + offset * DIM, query_square, DIM, WIDTH, TYPE)
    norm, deltas = normaliser(lse + offset, delta + offset, QUERIES)
    acc = tl.zeros([QUERIES, WIDTH], dtype=ACC)
    SPLIT: tl.constexpr = BLOCK // KEYS
    entry = row_tiles + begin
    slot = tl.load(entry)
    for i in range(0, full * SPLIT):
        first = (slot * BLOCK + (i % SPLIT) * KEYS).to(tl.int64) * DIM
        slot = tl.load(entry + (i + 1) // SPLIT)
        keys = rows_of(k + first, key_square, DIM, WIDTH, TYPE)
        values = rows_of(v + first, key_square, DIM, WIDTH, TYPE)
        dscores = scores_by_query(
            queries, keys, values, grads, norm, deltas, None, scale_log2, False, PRECISION, ACC
        )
        acc = tl.dot(dscores, keys, acc, input_precision=PRECISION, out_dtype=ACC)
    low, high, prefix_low, prefix_high = query_intervals(
        lo, hi, prefix_lo, prefix_hi, batch.to(tl.int64) * rows * BLOCK + token, QUERIES, PREFIX
    )
    for i in range(full * SPLIT, (end - begin) * SPLIT):
        first = (slot * BLOCK + (i % SPLIT) * KEYS).to(tl.int64) * DIM
        position = tl.load(key_base + source * slots + slot) + (i % SPLIT) * KEYS + tl.arange(0, KEYS)
        slot = tl.load(entry + (i + 1) // SPLIT)
        keys = rows_of(k + first, key_square, DIM, WIDTH, TYPE)
        values = rows_of(v + first, key_square, DIM, WIDTH, TYPE)
        seen = visible(position[None, :], low, high, prefix_low, prefix_high, PREFIX)
        dscores = scores_by_query(
            queries, keys, values, grads, norm, deltas, seen, scale_log2, True, PRECISION, ACC
        )
        acc = tl.dot(dscores, keys, acc, input_precision=PRECISION, out_dtype=ACC)
    add_to(dq + offset * DIM, query_square, QUERIES, acc * scale, QUERIES, DIM, WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def _dkv(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    key_ptr,
    key_full,
    key_tiles,
    key_base,
    lo,
    hi,
    prefix_lo,
    prefix_hi,
    scale_log2,
    scale,
    source,
    num_sources,
    rows,
    slots,
    key_tokens,
    heads,
    kv_heads,
    mask_heads,
    LISTS: tl.constexpr,  # lists of a key head
    SHARE: tl.constexpr,  # query heads that share a list
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PREFIX: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PARTS: tl.constexpr = BLOCK // KEYS
    SPLIT: tl.constexpr = BLOCK // QUERIES
    STEP: tl.constexpr = SHARE * SPLIT  # query tiles of one entry
    # Slot 0 may hold the sink, the longest list by far: that of every head starts first.
    pid = tl.program_id(0)
    sinks = tl.num_programs(0) // slots
    late = pid >= sinks
    rest = tl.where(late, pid - sinks, pid)
    width = tl.where(late, (slots - 1) * PARTS, PARTS)
    key_head = rest // width  # counts over the batch
    part = rest % width + tl.where(late, PARTS, 0)
    slot = part // PARTS
    batch = key_head // kv_heads
    kv_head = key_head % kv_heads
    entries = 0
    for member in range(LISTS):
        mask_head = batch * mask_heads + (kv_head * LISTS + member) * mask_heads // (kv_heads * LISTS)
        x = (mask_head * num_sources + source) * slots + slot
        entries += tl.load(key_ptr + x + 1) - tl.load(key_ptr + x)
    if entries == 0:
        return
    ACC: tl.constexpr = dk.dtype.element_ty
    tokens = rows.to(tl.int64) * BLOCK
    offset = (batch * heads + kv_head * (heads // kv_heads)).to(tl.int64) * tokens
    key_offset = (key_head.to(tl.int64) * key_tokens + part * KEYS) * DIM
    query_square, key_square = square(QUERIES, DIM, WIDTH), square(KEYS, DIM, WIDTH)
    keys = rows_of(k + key_offset, key_square, DIM, WIDTH, TYPE)
    values = rows_of(v + key_offset, key_square, DIM, WIDTH, TYPE)
    position = tl.load(key_base + source * slots + slot) + (part % PARTS) * KEYS
    position = (position + tl.arange(0, KEYS))[:, None]
    key_acc = tl.zeros([KEYS, WIDTH], dtype=ACC)
    value_acc = tl.zeros([KEYS, WIDTH], dtype=ACC)
    for member in range(LISTS):
        mask_head = batch * mask_heads + (kv_head * LISTS + member) * mask_heads // (kv_heads * LISTS)
        x = (mask_head * num_sources + source) * slots + slot
        begin, end = tl.load(key_ptr + x), tl.load(key_ptr + x + 1)
        full = tl.load(key_full + x)
        first_head = offset + member * SHARE * tokens
        entry = key_tiles + begin
        row = tl.load(entry)
        for i in range(0, full * STEP):
            token = row * BLOCK + (i % SPLIT) * QUERIES
            place = first_head + ((i // SPLIT) % SHARE) * tokens + token
            row = tl.load(entry + (i + 1) // STEP)
            queries = rows_of(q + place * DIM, query_square, DIM, WIDTH, TYPE)
            grads = rows_of(dout + place * DIM, query_square, DIM, WIDTH, TYPE)
            norm, deltas = normaliser(lse + place, delta + place, QUERIES)
            key_acc, value_acc = add_by_key(
                queries,
                keys,
                values,
                grads,
                norm,
                deltas,
                None,
                scale_log2,
                key_acc,
                value_acc,
                False,
                PRECISION,
            )
        for i in range(full * STEP, (end - begin) * STEP):
            token = row * BLOCK + (i % SPLIT) * QUERIES
            place = first_head + ((i // SPLIT) % SHARE) * tokens + token
            row = tl.load(entry + (i + 1) // STEP)
            queries = rows_of(q + place * DIM, query_square, DIM, WIDTH, TYPE)
            grads = rows_of(dout + place * DIM, query_square, DIM, WIDTH, TYPE)
            norm, deltas = normaliser(lse + place, delta + place, QUERIES)
            low, high, prefix_low, prefix_high = query_intervals(
                lo, hi, prefix_lo, prefix_hi, batch * tokens + token, QUERIES, PREFIX
            )
            seen = visible(position, low, high, prefix_low, prefix_high, PREFIX)
            key_acc, value_acc = add_by_key(
                queries,
                keys,
                values,
                grads,
                norm,
                deltas,
                seen,
                scale_log2,
                key_acc,
                value_acc,
                True,
                PRECISION,
            )
    add_to(dk + key_offset, key_square, KEYS, key_acc * scale, KEYS, DIM, WIDTH)
    add_to(dv + key_offset, key_square, KEYS, value_acc, KEYS, DIM, WIDTH)
