"""The attention tests of other projects: their masks, given twice, and the judge of long sequences.

A mask is given once for the library, as documents of a batch or as a plan of visible intervals, and once
for the judge, as a predicate over pairs of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import oracle
import tolerance
import torch
from torch import Tensor

from sparring.kernels import Geometry, Plan

BOUND = 1e-10
Documents = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Mask:
    """sees: (queries [R, 1], keys [1, S]) -> bool [R, S].

    intervals: positions [S] -> (lo, hi, prefix lo, prefix hi); None where the mask is causal attention
    within `documents` (of every batch row), which a batch can say.
    """

    length: int
    sees: Callable[[Tensor, Tensor], Tensor]
    intervals: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    documents: Documents | None = None

    @property
    def batch_size(self) -> int:
        return len(self.documents or (0,))

    def plan(self, block_size: int) -> Plan:
        """Every visible tile."""
        if self.documents is not None:
            geometry = Geometry.causal(self.batch_size, self.length, block_size, self.documents)
        else:
            lo, hi, *prefix = (x[None] for x in self.intervals(torch.arange(self.length)))
            geometry = Geometry.from_intervals(lo, hi, block_size, tuple(prefix))
        shape = (self.batch_size, 1, geometry.num_blocks, geometry.num_blocks)
        return Plan.build(geometry, torch.ones(shape, dtype=torch.bool))

    def batch(self) -> dict[str, Tensor] | None:
        """A batch that says the documents; None where it cannot, for padding between documents too."""
        if self.documents is None:
            return None
        shape = (self.batch_size, self.length)
        ids, mask = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        for row, ranges in enumerate(self.documents):
            for number, (start, end) in enumerate(ranges):
                ids[row, start:end], mask[row, start:end] = number + 1, 1
            if mask[row, ranges[0][0] : ranges[-1][1]].min() == 0:
                return None
        return {"input_ids": torch.zeros_like(ids), "document_ids": ids, "attention_mask": mask}

    def pairs(self, rows: Tensor) -> Tensor:
        """bool [batch, 1, R, S]: whom each of the queries `rows` sees."""
        i, j = rows[:, None], torch.arange(self.length)[None]
        if self.documents is None:
            return self.sees(i, j)[None, None]
        inside = torch.zeros(self.batch_size, 1, len(rows), self.length, dtype=torch.bool)
        for row, ranges in enumerate(self.documents):
            for start, end in ranges:
                inside[row, 0] |= (start <= j) & (i < end)
        return inside & self.sees(i, j)


def full(length: int) -> Mask:
    return Mask(length, lambda i, j: i * j >= 0, lambda i: (0 * i, 0 * i + length - 1, 0 * i, 0 * i - 1))


def documents(length: int, ranges: Documents) -> Mask:
    return Mask(length, lambda i, j: j <= i, documents=ranges)


def packed(length: int, *borders: int, batch: int = 1) -> Mask:
    """Causal documents between `borders`; one document without any."""
    edges = (0, *borders, length)
    return documents(length, (tuple(zip(edges[:-1], edges[1:], strict=True)),) * batch)


def cut(length: int, size: int) -> Mask:
    """Causal documents of `size` tokens, the last one shorter."""
    return packed(length, *range(size, length, size))


def window(length: int, width: int, sinks: int = 0) -> Mask:
    """A query, the `width` tokens before it, and the first tokens of the sequence."""

    def intervals(i):
        return i - width, i, 0 * i, 0 * i + sinks - 1

    return Mask(length, lambda i, j: (j <= i) & ((j >= i - width) | (j < sinks)), intervals)


def block_causal(length: int, size: int, sinks: int) -> Mask:
    """All of one's own and of the previous chunk of `size` tokens, and the first tokens."""

    def intervals(i):
        first = i // size * size
        return first - size, (first + size - 1).clamp(max=length - 1), 0 * i, 0 * i + sinks - 1

    def sees(i, j):
        behind = i // size - j // size
        return (behind == 0) | (behind == 1) | (j < sinks)

    return Mask(length, sees, intervals)


def causal_blockwise(length: int, size: int, last: int, first: int) -> Mask:
    """Causal inside the `last` chunks of `size` tokens up to one's own, and the `first` chunks."""

    def intervals(i):
        return (i // size - last + 1) * size, i, 0 * i, 0 * i + first * size - 1

    def sees(i, j):
        return (j <= i) & ((i // size - j // size < last) | (j // size < first))

    return Mask(length, sees, intervals)


def bi_causal(length: int) -> Mask:
    """Each half of the queries sees a band that ends on both sides along a diagonal."""
    half = length // 2

    def intervals(i):
        lo = torch.where(i < half, i, i - half)
        return lo, lo + half, 0 * i, 0 * i - 1

    def sees(i, j):
        return torch.where(i < half, (i <= j) & (j <= i + half), (i - half <= j) & (j <= i))

    return Mask(length, sees, intervals)


def shared_question(length: int, answers: int) -> Mask:
    """A question as long as each of the answers, which see it and themselves, causally."""
    part = length // (answers + 1)

    def intervals(i):
        return i // part * part, i, 0 * i, 0 * i + part - 1

    def sees(i, j):
        return (j <= i) & ((i // part == j // part) | (j < part))

    return Mask(length, sees, intervals)


def rows_to_judge(mask: Mask, block_size: int, world: int, most: int = 96) -> Tensor:
    """Queries, ascending: all, or those at borders of blocks, documents and shards and some drawn ones."""
    length = mask.length
    if length <= most:
        return torch.arange(length)
    g = torch.Generator().manual_seed(length)
    edges = {edge for ranges in mask.documents or () for document in ranges for edge in document}
    edges |= set(range(0, length, block_size)) | {length * rank // world for rank in range(world)}
    edges = torch.tensor(sorted(edges))
    edges = edges[torch.randperm(len(edges), generator=g)[: most // 4]]
    drawn = torch.randint(0, length, (most // 2,), generator=g)
    rows = torch.cat((edges - 1, edges, drawn, torch.tensor([0, length - 1])))
    return rows[(rows >= 0) & (rows < length)].unique()


def judge(rows, pairs, tensors, actual, tier="fp64", bounds=(BOUND,) * 4) -> None:
    """Compares out at the rows, and all of dq, dk, dv. tensors: q, k, v, dout, zero outside of the rows.

    These rows then decide every entry of the gradients, so the oracle needs no others, and stays exact.
    pairs: bool [B, 1 or H, R, S], whom the rows see.
    """
    q, k, v, dout = tensors
    pairs = pairs.expand(-1, q.shape[1], -1, -1)
    chosen = q[:, :, rows], k, v, pairs, dout[:, :, rows], torch.zeros(pairs.shape[:3])
    out, _, dq, dk, dv = oracle.attention(*chosen)
    everywhere = torch.zeros(q.shape, dtype=dq.dtype)
    everywhere[:, :, rows] = dq
    expected = out, everywhere, dk, dv
    actual = (actual[0][:, :, rows], *actual[1:])
    for name, x, y, bound in zip(("out", "dq", "dk", "dv"), actual, expected, bounds, strict=True):
        tolerance.check(tier, name, x, y, bound)
