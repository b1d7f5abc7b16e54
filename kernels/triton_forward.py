"""Portable Triton forward: one program per query tile walks its row's list of key blocks.

Full tiles come first in every list and need no mask; partial tiles compare key positions with the visible
intervals of the queries; columns have a kernel of their own. The running maximum is kept in base 2 inside
a kernel, the carried lse is natural. Shapes are those of reference.py.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import BoundPlan

INTERPRET = bool(triton.knobs.runtime.interpret)  # kernels below are bound to it by this import
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Arguments that must not make Triton compile a kernel anew when they are 1 or divisible by 16.
COUNTS = ["source", "num_sources", "rows", "slots", "groups", "count", "words", "num_tokens", "splits"]
COUNTS += ["heads", "kv_heads", "mask_heads", "column_heads"]

# The interpreter keeps the program id in a global: ranks that run as threads take turns.
_ONE_AT_A_TIME = threading.Lock() if INTERPRET else nullcontext()


class Config(NamedTuple):
    """Queries and keys of one tile in a kernel, warps and software pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


# (kernel, padded head dim, bytes an element), for H200; benchmarks/triton_tuning.py times alternatives.
CONFIGS = {
    ("forward", 64, 2): Config(128, 64, 4, 3),
    ("forward", 128, 2): Config(128, 128, 8, 3),
    ("forward", 256, 2): Config(128, 32, 8, 3),
    ("forward_columns", 64, 2): Config(128, 64, 8, 3),
    ("forward_columns", 128, 2): Config(128, 64, 8, 3),
    ("forward_columns", 256, 2): Config(64, 32, 8, 2),
    ("dq", 64, 2): Config(128, 64, 8, 3),
    ("dq", 128, 2): Config(128, 64, 8, 3),
    ("dq", 256, 2): Config(64, 64, 8, 2),
    ("dq_columns", 64, 2): Config(128, 64, 8, 3),
    ("dq_columns", 128, 2): Config(128, 64, 8, 3),
    ("dq_columns", 256, 2): Config(64, 32, 8, 2),
    ("dkv", 64, 2): Config(64, 128, 8, 3),
    ("dkv", 128, 2): Config(64, 128, 8, 3),
    ("dkv", 256, 2): Config(32, 64, 8, 2),
    ("dkv_columns", 64, 2): Config(64, 64, 4, 3),
    ("dkv_columns", 128, 2): Config(64, 64, 8, 2),
    ("dkv_columns", 256, 2): Config(32, 64, 8, 2),
}
_FP32 = {64: Config(32, 32, 4, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)}


@lru_cache(maxsize=256)
def config(kernel: str, dim: int, itemsize: int, block_size: int, device: torch.device) -> Config:
    """The configuration of a kernel, cut down to the block size and the device's shared memory."""
    padded = max(64, triton.next_power_of_2(dim))
    if itemsize == 2:
        queries, keys, warps, stages = CONFIGS[kernel, padded, itemsize]
    else:
        queries, keys, warps, stages = _FP32[padded]
    if INTERPRET:
        queries = keys = 128
    if max(queries, keys) > block_size:
        queries, keys, warps = min(queries, block_size), min(keys, block_size), 4
    if device.type == "cuda":
        limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        held, streamed = (2 * keys, 2 * queries) if "dkv" in kernel else (2 * queries, 2 * keys)
        held = queries if "forward" in kernel else held
        while stages > 1 and (held + stages * streamed) * padded * itemsize > limit:
            stages -= 1
    return Config(queries, keys, warps, stages)


def launch(kernel, programs: int, tensor: Tensor, arguments: tuple, **meta) -> None:
    """Runs `programs` programs of a kernel on the device of `tensor`."""
    if programs == 0:
        return
    on_device = torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
    with _ONE_AT_A_TIME, on_device:
        kernel[(programs,)](*arguments, **meta)


def check(scale: float, inputs: tuple[Tensor, ...], accumulators: tuple[Tensor, ...]) -> None:
    """Errors for what these kernels cannot do."""
    q = inputs[0]
    if q.dtype == torch.float64 and not INTERPRET:
        raise NotImplementedError("impl='triton' has no fp64; use impl='reference'")
    if not q.is_cuda and not INTERPRET:
        raise ValueError(f"impl='triton' needs CUDA tensors, got {q.device}; use impl='reference'")
    if not 1 <= q.shape[3] <= 256:
        raise NotImplementedError(
            f"impl='triton' has head dims up to 256, got {q.shape[3]}; use impl='reference'"
        )
    if not scale > 0:
        raise ValueError(f"impl='triton' needs a scale > 0, got {scale}; use impl='reference'")
    for x in accumulators:
        if not x.is_contiguous():
            raise ValueError(
                f"accumulators are updated in place and must be contiguous, got strides {x.stride()} "
                f"for shape {tuple(x.shape)}; allocate them with torch.zeros"
            )


def options(kernel: str, q: Tensor, bound: BoundPlan) -> tuple[Config, dict]:
    """Configuration and the compile-time arguments that all kernels share."""
    dim = q.shape[3]
    chosen = config(kernel, dim, q.element_size(), bound.block_size, q.device)
    return chosen, dict(
        BLOCK=bound.block_size,
        QUERIES=chosen.queries,
        KEYS=chosen.keys,
        DIM=dim,
        WIDTH=max(16, triton.next_power_of_2(dim)),
        PREFIX=bound.prefix_lo is not None,
        TYPE=_compute_type(q.dtype),
        PRECISION="tf32" if q.element_size() == 2 else "ieee",  # no effect on 16-bit operands
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )


def _compute_type(dtype: torch.dtype) -> tl.dtype:
    if dtype == torch.bfloat16:
        return tl.float32 if INTERPRET else tl.bfloat16  # the interpreter cannot multiply bf16
    return {torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}[dtype]


def intervals(bound: BoundPlan) -> tuple[Tensor, ...]:
    """lo, hi and the prefix interval, or stand-ins for it that PREFIX=False leaves unread."""
    if bound.prefix_lo is None:
        return bound.lo, bound.hi, bound.lo, bound.hi
    return bound.lo, bound.hi, bound.prefix_lo, bound.prefix_hi


def forward_step(q, k, v, bound: BoundPlan, source: int, out, lse, scale: float, fresh: bool = False) -> None:
    """Continues the carried normalised `out` and natural-log `lse` with the tiles of one source.

    fresh: they carry nothing yet, whatever they hold.
    """
    check(scale, (q, k, v), (out, lse))
    if fresh:
        out.zero_()
        lse.fill_(-torch.inf)
    batch, heads, _, _ = q.shape
    chosen, meta = options("forward", q, bound)
    arguments = (q.contiguous(), k.contiguous(), v.contiguous(), out, lse)
    arguments += (bound.row_ptr, bound.row_full, bound.row_tiles, bound.key_base, *intervals(bound))
    arguments += (scale * LOG2E.value, source, bound.num_sources, bound.rows, bound.blocks_per_source)
    launch(
        _forward,
        batch * heads * bound.rows * (bound.block_size // chosen.queries),
        q,
        (*arguments, k.shape[2], heads, k.shape[1], bound.mask_heads),
        **meta,
    )


@triton.jit
def square(COUNT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[COUNT, WIDTH]: where COUNT consecutive rows of a [tokens, DIM] matrix lie."""
    return tl.arange(0, COUNT)[:, None] * DIM + tl.arange(0, WIDTH)[None, :]


@triton.jit
def rows_of(pointer, places, DIM: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    """Consecutive rows of a [tokens, DIM] matrix from `pointer` on; zeros beyond DIM."""
    if DIM == WIDTH:
        return tl.load(pointer + places).to(TYPE)
    else:
        return tl.load(pointer + places, mask=(tl.arange(0, WIDTH) < DIM)[None, :], other=0.0).to(TYPE)


@triton.jit
def query_program(rows, heads, kv_heads, BLOCK: tl.constexpr, QUERIES: tl.constexpr):
    """(batch, query head, row, first token) of this program.

    The query heads of one key head run side by side and share its keys in cache; last rows, the longest
    ones under a causal mask, come first.
    """
    parts = rows * (BLOCK // QUERIES)
    pid = tl.program_id(0)
    member = pid % (heads // kv_heads)
    rest = pid // (heads // kv_heads)
    part = parts - 1 - rest % parts
    rest = rest // parts
    head = (rest % kv_heads) * (heads // kv_heads) + member
    return rest // kv_heads, head, part // (BLOCK // QUERIES), part * QUERIES


@triton.jit
def visible(position, low, high, prefix_low, prefix_high, PREFIX: tl.constexpr):
    """Whether queries see key positions; position is [1, keys] or [keys, 1], the others [queries]."""
    AXIS: tl.constexpr = 1 if position.shape[0] == 1 else 0
    seen = (position >= tl.expand_dims(low, AXIS)) & (position <= tl.expand_dims(high, AXIS))
    if PREFIX:
        prefix = position >= tl.expand_dims(prefix_low, AXIS)
        seen = seen | (prefix & (position <= tl.expand_dims(prefix_high, AXIS)))
    return seen


@triton.jit
def accumulate(q, k, v, seen, scale, peak, total, acc, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Online softmax over one tile, in base 2; peak is -inf and total 0 until something was seen."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=acc.dtype)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    shift = new_peak
    if MASKED:
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * scale - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
    return new_peak, total, acc


@triton.jit
def unseen(TYPE: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """peak, total, acc of queries that have seen nothing."""
    peak = tl.full([COUNT], float("-inf"), TYPE)
    return peak, tl.zeros([COUNT], TYPE), tl.zeros([COUNT, WIDTH], TYPE)


@triton.jit
def merge(out, lse, places, peak, total, acc, COUNT: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Merges what these keys give into the carried out and lse; rows that had seen nothing are not read.

    Merged at the end, because weights relative to the peak of these keys alone round the largest one, 1,
    exactly; relative to a carried lse they would not.
    """
    total = tl.where(total == 0.0, 1.0, total)  # peak is -inf there
    peak += tl.log2(total)
    lse += tl.arange(0, COUNT)
    carried = tl.load(lse) * LOG2E
    top = tl.maximum(carried, peak)
    shift = tl.where(top == float("-inf"), 0.0, top)
    kept, added = tl.exp2(carried - shift), tl.exp2(peak - shift)
    both = tl.where(top == float("-inf"), 1.0, kept + added)
    tl.store(lse, (top + tl.log2(both)) * LN2)
    inside = (tl.arange(0, WIDTH) < DIM)[None, :]
    known = tl.load(out + places, mask=(kept > 0.0)[:, None] & inside, other=0.0)
    acc = acc * (added / (both * total))[:, None] + known * (kept / both)[:, None]
    tl.store(out + places, acc, mask=inside)


@triton.jit
def query_intervals(lo, hi, prefix_lo, prefix_hi, first, COUNT: tl.constexpr, PREFIX: tl.constexpr):
    """lo, hi, prefix_lo, prefix_hi [COUNT] of the queries from `first` on (counted over the batch)."""
    places = first + tl.arange(0, COUNT)
    low, high = tl.load(lo + places), tl.load(hi + places)
    prefix_low, prefix_high = low, high
    if PREFIX:
        prefix_low, prefix_high = tl.load(prefix_lo + places), tl.load(prefix_hi + places)
    return low, high, prefix_low, prefix_high


@triton.jit(do_not_specialize=COUNTS)
def _forward(
    q,
    k,
    v,
    out,
    lse,
    row_ptr,
    row_full,
    row_tiles,
    key_base,
    lo,
    hi,
    prefix_lo,
    prefix_hi,
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
    offset = (batch * heads + head).to(tl.int64) * rows * BLOCK + token
    key_offset = (batch * kv_heads + head * kv_heads // heads).to(tl.int64) * key_tokens * DIM
    q, out, lse = q + offset * DIM, out + offset * DIM, lse + offset
    k, v = k + key_offset, v + key_offset
    query_square, key_square = square(QUERIES, DIM, WIDTH), square(KEYS, DIM, WIDTH)
    queries = rows_of(q, query_square, DIM, WIDTH, TYPE)
    peak, total, acc = unseen(out.dtype.element_ty, QUERIES, WIDTH)
    # The next entry is read one iteration ahead, so that the loads of keys do not wait for it.
    # Lists have one readable entry past their end.
    SPLIT: tl.constexpr = BLOCK // KEYS
    entry = row_tiles + begin
    slot = tl.load(entry)
    for i in range(0, full * SPLIT):
        first = (slot * BLOCK + (i % SPLIT) * KEYS).to(tl.int64) * DIM
        slot = tl.load(entry + (i + 1) // SPLIT)
        keys = rows_of(k + first, key_square, DIM, WIDTH, TYPE)
        values = rows_of(v + first, key_square, DIM, WIDTH, TYPE)
        peak, total, acc = accumulate(queries, keys, values, None, scale, peak, total, acc, False, PRECISION)
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
        peak, total, acc = accumulate(queries, keys, values, seen, scale, peak, total, acc, True, PRECISION)
    merge(out, lse, query_square, peak, total, acc, QUERIES, DIM, WIDTH)
