"""Reference attention over a bound plan: plain PyTorch, any device, fp64 capable; the path used on CPU.

Work goes row by row: the chosen keys of one query block are gathered and treated as one small dense
attention. All functions work in place on accumulators owned by the caller (fp32, or fp64 for fp64
inputs). The other implementations offer the same four functions.

Shapes: q [B, H, M*block, D]; k, v [B, Hk, n*block, D] of one source; ck, cv [B, Hb, groups, C, D], the
keys and values of the columns with Hb = max(Hc, Hk); out like q; lse, delta [B, H, M*block].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .bound import BoundPlan
from .plan import tile_of_columns


@dataclass(frozen=True)
class _Row:
    """One query block of the query heads that share a mask, and the keys chosen for it."""

    batch: int
    heads: slice  # query heads
    kv_heads: slice
    tokens: slice  # of the queries
    keys: Tensor  # int64 [K], physical key tokens, or column indices
    visible: Tensor | None  # bool [block, last keys]; the keys before them are all visible
    group: int = 0  # column group


def forward_step(q, k, v, bound: BoundPlan, source: int, out, lse, scale: float, fresh: bool = False) -> None:
    """Continues the carried normalised `out` and natural-log `lse` with the tiles of one source.

    fresh: they carry nothing yet, whatever they hold.
    """
    if fresh:
        out.zero_()
        lse.fill_(-torch.inf)
    for row in _tile_rows(bound, source, q.shape[1], k.shape[1]):
        k_row, v_row = (x[row.batch, row.kv_heads][:, row.keys] for x in (k, v))
        _forward_row(q, k_row, v_row, row, out, lse, scale)


def forward_columns(q, ck, cv, bound: BoundPlan, out, lse, scale: float) -> None:
    """Continues `out` and `lse` with the columns; a column inside a chosen tile is skipped."""
    for row in _column_rows(bound, q.shape[1], ck.shape[1]):
        k_row, v_row = (x[row.batch, row.kv_heads, row.group][:, row.keys] for x in (ck, cv))
        _forward_row(q, k_row, v_row, row, out, lse, scale)


def backward_step(q, k, v, dout, lse, delta, bound: BoundPlan, source: int, dq, dk, dv, scale: float) -> None:
    """Adds the gradients of the tiles of one source; lse is the final one, delta = sum(out * dout) - dlse."""
    for row in _tile_rows(bound, source, q.shape[1], k.shape[1]):
        k_row, v_row = (x[row.batch, row.kv_heads][:, row.keys] for x in (k, v))
        dk_row, dv_row = _backward_row(q, k_row, v_row, dout, lse, delta, row, dq, scale)
        dk[row.batch, row.kv_heads].index_add_(1, row.keys, dk_row)
        dv[row.batch, row.kv_heads].index_add_(1, row.keys, dv_row)


def backward_columns(q, ck, cv, dout, lse, delta, bound: BoundPlan, dq, dck, dcv, scale: float) -> None:
    """Adds the gradients of the columns to dq and to dck, dcv (shaped like ck)."""
    for row in _column_rows(bound, q.shape[1], ck.shape[1]):
        k_row, v_row = (x[row.batch, row.kv_heads, row.group][:, row.keys] for x in (ck, cv))
        dk_row, dv_row = _backward_row(q, k_row, v_row, dout, lse, delta, row, dq, scale)
        dck[row.batch, row.kv_heads, row.group].index_add_(1, row.keys, dk_row)
        dcv[row.batch, row.kv_heads, row.group].index_add_(1, row.keys, dv_row)


def _forward_row(q, k, v, row: _Row, out, lse, scale: float) -> None:
    """k, v: [kv heads, K, D]. The carried state enters the softmax as one more key of score lse."""
    dtype = out.dtype
    queries = _fold(q, row).to(dtype) * scale
    scores = _scores(queries, k.to(dtype), row)
    old_out, old_lse = _fold(out, row), _fold(lse, row)
    peak = torch.maximum(scores.amax(-1), old_lse)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)  # a row that has seen nothing yet
    weights = scores.sub_(peak[..., None]).exp_()
    carried = (old_lse - peak).exp()
    total = weights.sum(-1) + carried
    value = torch.baddbmm(old_out * carried[..., None], weights, v.to(dtype))
    value = value / total.masked_fill(total == 0, 1.0)[..., None]
    _target(out, row).copy_(_unfold(value, row))
    _target(lse, row).copy_(_unfold(peak + total.log(), row))


def _backward_row(q, k, v, dout, lse, delta, row: _Row, dq, scale: float) -> tuple[Tensor, Tensor]:
    dtype = dq.dtype
    queries, grad = _fold(q, row).to(dtype) * scale, _fold(dout, row).to(dtype)
    k, v = k.to(dtype), v.to(dtype)
    final = _fold(lse, row)
    final = final.masked_fill(final == -torch.inf, 0.0)
    weights = _scores(queries, k, row).sub_(final[..., None]).exp_()
    dv = weights.mT @ grad
    dscores = (grad @ v.mT).sub_(_fold(delta, row)[..., None]).mul_(weights)
    _target(dq, row).add_(_unfold(dscores @ k, row), alpha=scale)
    return dscores.mT @ queries, dv


def _scores(queries: Tensor, k: Tensor, row: _Row) -> Tensor:
    """[kv heads, queries of all heads, K], -inf where invisible."""
    scores = queries @ k.mT
    if row.visible is not None:
        size, masked = row.visible.shape
        tail = scores.unflatten(1, (-1, size))[..., scores.shape[2] - masked :]
        tail.masked_fill_(~row.visible, -torch.inf)
    return scores


def _target(x: Tensor, row: _Row) -> Tensor:
    return x[row.batch, row.heads, row.tokens]


def _fold(x: Tensor, row: _Row) -> Tensor:
    """[B, H, S, ...] -> [kv heads, (query heads of each) * block, ...]."""
    part = _target(x, row)
    return part.reshape(row.kv_heads.stop - row.kv_heads.start, -1, *part.shape[2:])


def _unfold(x: Tensor, row: _Row) -> Tensor:
    return x.reshape(row.heads.stop - row.heads.start, -1, *x.shape[2:])


def _head_slices(mask_head: int, mask_heads: int, heads: int, kv_heads: int) -> tuple[slice, slice]:
    """Query heads that share a mask, and the key heads that they read."""
    width = heads // mask_heads
    first = mask_head * width
    first_kv = first * kv_heads // heads
    return slice(first, first + width), slice(first_kv, first_kv + max(1, kv_heads // mask_heads))


def _tile_rows(bound: BoundPlan, source: int, heads: int, kv_heads: int) -> Iterator[_Row]:
    size, device = bound.block_size, bound.row_tiles.device
    sources, rows = bound.num_sources, bound.rows
    pointer, num_full = bound.row_ptr.tolist(), bound.row_full.tolist()
    inside = torch.arange(size, device=device)
    base = bound.key_base[source * bound.blocks_per_source :].long()
    for x in range(source, len(num_full), sources):
        first, last = pointer[x], pointer[x + 1]
        if first == last:
            continue
        (batch_head, row) = divmod(x // sources, rows)
        batch, mask_head = divmod(batch_head, bound.mask_heads)
        slots = bound.row_tiles[first:last].long()
        tokens = slice(row * size, (row + 1) * size)
        visible = None
        if num_full[x] < last - first:
            partial = base[slots[num_full[x] :]][:, None] + inside
            visible = _visible(bound, batch, tokens, partial.flatten())
        heads_slice, kv_slice = _head_slices(mask_head, bound.mask_heads, heads, kv_heads)
        keys = (slots[:, None] * size + inside).flatten()
        yield _Row(batch, heads_slice, kv_slice, tokens, keys, visible)


def _column_rows(bound: BoundPlan, heads: int, kv_heads: int) -> Iterator[_Row]:
    size = bound.block_size
    batch_size, column_heads = bound.columns.shape[:2]
    mask_heads = max(bound.mask_heads, column_heads)
    begin, end = bound.column_begin.tolist(), bound.column_end.tolist()
    # Columns between these positions are seen by every query of a row: most need no mask.
    clear_from = bound.lo.unflatten(1, (bound.rows, size)).amax(2)
    clear_to = bound.hi.unflatten(1, (bound.rows, size)).amin(2)
    groups = [0] * bound.rows if bound.column_group is None else bound.column_group.tolist()
    for batch in range(batch_size):
        for mask_head in range(mask_heads):
            head = mask_head * column_heads // mask_heads
            tile_head = mask_head * bound.mask_heads // mask_heads
            heads_slice, kv_slice = _head_slices(mask_head, mask_heads, heads, kv_heads)
            for row, group in enumerate(groups):
                first, last = begin[batch][head][row], end[batch][head][row]
                if first == last:
                    continue
                positions = bound.columns[batch, head, group, first:last]
                bits = bound.tiles[batch, tile_head, row][None, None, None]
                covered = tile_of_columns(bits, positions[None, None, None], size)[0, 0, 0]
                clear = (positions >= clear_from[batch, row]) & (positions <= clear_to[batch, row])
                masked = (~covered & ~clear).nonzero()[:, 0]
                keys = torch.cat(((~covered & clear).nonzero()[:, 0], masked))
                if len(keys):
                    tokens = slice(row * size, (row + 1) * size)
                    visible = None
                    if len(masked):
                        visible = _visible(bound, batch, tokens, positions[masked])
                    yield _Row(batch, heads_slice, kv_slice, tokens, keys + first, visible, group)


def _visible(bound: BoundPlan, batch: int, tokens: slice, positions: Tensor) -> Tensor:
    """bool [block, K]."""
    pairs = [(bound.lo, bound.hi), (bound.prefix_lo, bound.prefix_hi)]
    seen = torch.zeros((), dtype=torch.bool, device=positions.device)
    for lo, hi in pairs[: 2 if bound.prefix_lo is not None else 1]:
        lo, hi = lo[batch, tokens, None], hi[batch, tokens, None]
        seen = seen | ((lo <= positions) & (positions <= hi))
    return seen


def attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The specification: softmax attention under an element mask; differentiable, quadratic memory.

    q: [B, H, Sq, D]; k, v: [B, Hk, Sk, D]; mask: bool [B, 1 | Hk | H, Sq, Sk]. A query that sees nothing
    gives out 0 and lse -inf. Returns out like q and lse [B, H, Sq], in the dtype of q.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = mask.repeat_interleave(q.shape[1] // mask.shape[1], 1)
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    empty = ~mask.any(-1)
    # softmax of a row without keys would be NaN, in the gradient too
    scores = scores.masked_fill(empty[..., None], 0.0)
    weights = scores.softmax(-1).masked_fill(empty[..., None], 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty, -torch.inf)
    return weights @ v, lse
